"""Tests of `aimscale --help`: all that it lists works."""

import multiprocessing
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused
from PIL import Image

from aimscale.analysis.laws import LAWS
from aimscale.sweeps.cli.main import load_verb, main
from aimscale.sweeps.planning.sweepfile import preset_names

ROOT = Path(__file__).parents[3]


def test_light_modules_import_nothing_heavy() -> None:
    harness = ("run.config", "run.directory", "run.schedule", "run.row", "run.failures", "device.memory")
    names = ("sweeps.cli.main", "analysis", "aim.config", "aim.cost", *(f"harness.{name}" for name in harness))
    modules = ", ".join(f"aimscale.{name}" for name in names)
    heavy = ("torch", "deepspeed", "pandas", "scipy", "matplotlib")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "call",
    [
        "from aimscale.sweeps.cli.main import main; main(['--version'])",
        "from aimscale.harness.run.failures import run_worker; sys.argv.append('.'); run_worker(lambda _: 0, '')",
    ],
)
def test_no_object_is_frozen_at_exit_which_nanobind_would_report_as_leaked(call: str) -> None:
    code = f"import atexit, gc, sys; atexit.register(lambda: print('frozen:', gc.get_freeze_count())); {call}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.splitlines()[-1] == "frozen: 0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lanch", "there is no verb 'lanch'; did you mean 'launch'?"),
        ("plan isoflob", "did you mean 'isoflop'?"),
        ("plan mysweep.yml", "did you mean 'mysweeps.yaml'?"),
        ("plan ?", preset_names()[-1]),
        ("fit table.csv --columns N=n,D=d,L=l --law ?", f"{[*LAWS][-1]}."),
    ],
)
def test_an_unknown_name_is_one_sentence_with_the_nearest(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mysweeps.yaml").touch()
    Path("table.csv").write_text("n,d,l\n1,2,3\n")
    assert refused(*line.split()).endswith(f"{words}\n")


def test_a_deleted_working_directory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory was deleted" in refused("status", "demo")


def test_a_command_whose_output_is_closed_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit, match="0"):
        main(["status", "demo", "--root", str(tmp_path)])


def test_a_device_is_no_list_of_classes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert "/dev/full is a pipe" in refused("data", "pack", tmp_path, tmp_path / "out", "--classes", "/dev/full")


@pytest.mark.parametrize(
    ("limit", "most", "words"),
    [(resource.RLIMIT_NOFILE, 0, "Too many open files"), (resource.RLIMIT_FSIZE, 1024, "File too large")],
)
def test_a_limit_of_the_system_is_one_sentence(limit: int, most: int, words: str, tmp_path: Path) -> None:
    """Not even the folder can be listed with the open files that there are: it "holds no images" then."""
    for name in "abc":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    load_verb("data")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def pack() -> None:
        resource.setrlimit(limit, (most, most))
        theirs.send(refused("data", "pack", tmp_path, tmp_path / "out"))

    process = context.Process(target=pack)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert words in ours.recv()


def test_an_analysis_verb_takes_a_sweep_by_its_name_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, names = tmp_path / "aimscale-runs" / "demo", ("demo", str(ROOT / "sweeps/planning/presets/demo.yaml"))
    for name in names:
        assert "launch it first" in refused("compare", name)
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests/studies/cifar/cifar.parquet", folder / "results.parquet")
    said = set()
    for name in (*names, "aimscale-runs/demo"):
        with pytest.raises(SystemExit, match="0"):
            main(["compare", name])
        said.add(capsys.readouterr().out.rpartition("next:")[0])
    (tmp_path / "aimscale-runs").rename(root := tmp_path / "my runs")
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "demo", "--root", str(root)])
    out, _, following = capsys.readouterr().out.rpartition("next: aimscale ")
    assert said == {out}
    assert shlex.split(following) == ["report", str(root / "demo")]
