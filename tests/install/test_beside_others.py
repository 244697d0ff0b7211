"""Nothing but `aimscale` is installed: PyPI's `aim` (the experiment tracker) and aimscale share an environment."""

from __future__ import annotations

import functools
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = "from aimscale.analysis.report.page import TEMPLATES; print((TEMPLATES / 'report.html').read_text())"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_lives_beside_pypis_aim(tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # what both need is taken from this environment where it is there; only the two packages are of their own
    (Path(next(home.glob("lib/python*/site-packages"))) / "outer.pth").write_text("\n".join(site.getsitepackages()))
    source = tmp_path / "source"  # setuptools leaves a build folder behind, whose files later wheels would take in
    wanted = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "aimscale-runs", "site")
    shutil.copytree(ROOT, source, symlinks=True, ignore=wanted)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = functools.partial(subprocess.run, check=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--force-reinstall", str(source)])
    run([*pip, "aim>=3.20"])

    code = (
        "import aim, aimscale.aim.config, aimscale.analysis, aimscale.sweeps.cli.main as main\n"
        "print(aim.Run.__name__, aim.__file__, main.__file__, aimscale.aim.config.__file__, sep='\\n')"
    )
    name, *files = run([str(python), "-c", code]).stdout.splitlines()
    assert name == "Run"
    assert all(file.startswith(str(home)) for file in files)
    listed = run([str(python), "-m", "pip", "show", "-f", "aimscale"]).stdout.splitlines()
    tops = {line.strip().split("/")[0] for line in listed[listed.index("Files:") + 1 :]}
    assert {top for top in tops if not top.endswith(".dist-info")} <= {"aimscale", ".."}  # `..`: bin/aimscale
    command = str(home / "bin" / "aimscale")
    assert "launch" in run([command, "--help"]).stdout
    assert "aim-7B" in run([command, "status", "aim-paper"]).stdout  # sweep files are in the wheel,
    assert "<html" in run([str(python), "-c", TEMPLATE]).stdout  # and the report's template
