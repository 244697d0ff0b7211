"""The wheel and the sdist hold the files of the tree, and work where only they are installed."""

from __future__ import annotations

import functools
import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "aimscale"
TEMPLATE = """
from importlib.resources import files
print((files("aimscale.analysis.report") / "templates" / "report.html").read_text())
"""


def tree() -> set[str]:
    """Return the files of the package that git does not ignore, by their names in a wheel."""
    folders = [link.name for link in PACKAGE.iterdir() if link.is_symlink()]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard", *folders],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    own = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    return {f"aimscale/{name}" for name in (*filter(None, listed), *own)}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist; return their folder."""
    home = tmp_path_factory.mktemp("release")
    source = home / "source"  # setuptools leaves a build folder behind, whose files later wheels would take in
    wanted = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", "aimscale-runs", "site")
    shutil.copytree(ROOT, source, symlinks=True, ignore=wanted)
    build = [sys.executable, "-m", "build", "--outdir"]
    subprocess.run([*build, str(home / "dist"), str(source)], check=True, capture_output=True, text=True)
    subprocess.run([*build, str(home / "direct"), "--wheel", str(source)], check=True, capture_output=True, text=True)
    return home / "dist"


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_tree(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    (direct,) = (dist.parent / "direct").glob("*.whl")
    packed = contents(wheel)
    assert packed == contents(direct)
    assert {name for name in packed if name.startswith("aimscale/")} == tree()
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=False)
    assert done.returncode == 0


def use(python: Path, folder: Path) -> None:
    """Use an installed aimscale from another working directory."""
    command = str(python.with_name("aimscale"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = functools.partial(subprocess.run, check=True, cwd=folder, env=env, capture_output=True, text=True)
    assert run([command, "--version"]).stdout.startswith("aimscale ")
    assert " 0 failed" in run([command, "doctor"]).stdout
    rows = [f"{n},{d},{0.3 + 5 * n**-0.3 + 3 * d**-0.25}" for n in (1e5, 4e5, 2e6) for d in (1e5, 1e6, 1e7)]
    (folder / "losses.csv").write_text("\n".join(["params,images,loss", *rows]))
    fitted = run([command, "fit", "losses.csv", "--columns", "N=params,D=images,L=loss"]).stdout
    assert "0.3" in fitted
    assert "aim-7B" in run([command, "status", "aim-paper"]).stdout  # sweep files are there,
    assert "<html" in run([str(python), "-c", TEMPLATE]).stdout  # and the report's template
    where = run([str(python), "-c", "import aimscale.sweeps.cli.main as main; print(main.__file__)"]).stdout
    assert Path(where.strip()).is_relative_to(python.parents[1])


@pytest.mark.release
def test_the_sdist_lives_beside_pypis_aim(dist: Path, tmp_path: Path) -> None:
    """Nothing but `aimscale` is installed: PyPI's `aim` (the experiment tracker) and aimscale share an environment."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # what both need is taken from this environment where it is there; only the two packages are of their own
    (Path(next(home.glob("lib/python*/site-packages"))) / "outer.pth").write_text("\n".join(site.getsitepackages()))
    run = functools.partial(subprocess.run, check=True, cwd=tmp_path, capture_output=True, text=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--force-reinstall", *map(str, dist.glob("*.tar.gz"))])
    run([*pip, "aim>=3.20"])
    use(python, tmp_path)
    code = "import aim, aimscale.aim.config as ours; print(aim.Run.__name__, aim.__file__, ours.__file__, sep='\\n')"
    name, *files = run([str(python), "-c", code]).stdout.splitlines()
    assert name == "Run"
    assert all(file.startswith(str(home)) for file in files)
    listed = run([str(python), "-m", "pip", "show", "-f", "aimscale"]).stdout.splitlines()
    tops = {line.strip().split("/")[0] for line in listed[listed.index("Files:") + 1 :]}
    assert {top for top in tops if not top.endswith(".dist-info")} <= {"aimscale", ".."}  # `..`: bin/aimscale


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_environment_without_torch_analyses(dist: Path, tmp_path: Path) -> None:
    demo = ROOT / "docs" / "figures" / "demo" / "results.parquet"
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = functools.partial(subprocess.run, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    installed = run([str(python), "-m", "pip", "install", "-q", "--no-compile", *map(str, dist.glob("*.whl"))])
    assert installed.returncode == 0, installed.stderr
    assert run([str(python), "-c", "import torch"]).returncode == 1

    def aimscale(*words: str | Path, code: int = 0) -> str:
        done = run([str(python.with_name("aimscale")), *map(str, words)])
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    assert json.loads(aimscale("fit", demo, "--json"))
    code = "from pathlib import Path; from aimscale.analysis.publication.card import About; "
    code += "from aimscale.analysis.publication.folder import publish; "
    code += f"publish([Path({str(demo)!r})], Path('published'), About('a demo', 'Apache-2.0'))"
    done = run([str(python), "-c", code])
    assert done.returncode == 0, done.stderr
    for words in (
        ("forecast", demo, "--at", "N=1e6,D=1e6"),
        ("frontier", demo),
        ("correlate", demo),
        ("contrast", demo, "--by", "size"),
        ("rates", ROOT / "tests" / "analysis" / "tuning" / "steplaw.csv"),
        ("next", demo, "--target", "N=1e6,D=1e6", "--budget", "1"),
        ("compare", demo),
        ("verify", tmp_path / "published"),
        ("status", "aim-paper"),
        ("doctor",),
    ):
        aimscale(*words)
    aimscale("report", demo, "--out", "report.html", "--figures", "figures")
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "FLOPs" in aimscale("plan", "aim-paper", code=2)  # its images are not here
    assert "aimscale[train]" in aimscale("launch", "aim-paper", code=2)
    assert "aimscale[train]" in aimscale("data", "pack", "nowhere", "out", code=2)
    assert "nowhere does not exist" in aimscale("data", "info", "nowhere", code=2)  # an index is read without torch


@pytest.mark.release
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_a_fresh_environment_can_use_the_release(version: str, kind: str, dist: Path, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    assert python, f"python{version} is not on the PATH"
    (package,) = dist.glob(f"*.{kind}")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    inside = tmp_path / "venv" / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "-q", package], check=True)
    use(inside, tmp_path)
    shutil.rmtree(tmp_path / "venv")  # some GB
