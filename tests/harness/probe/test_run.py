"""`aimscale probe` on a run directory: alone, over ranks, again, and refusing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from commands import answer, refused, say
from trainers import start_ranks

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.harness.results import update_row
from aimscale.harness.run.config import run_config
from aimscale.harness.run.directory import WEIGHTS_CRC32, RunDir


@pytest.fixture
def run(task: Any, tmp_path: Path) -> RunDir:
    """A run of 8-px digits with one saved budget (random weights) and its row."""
    digits = task.section(train=str(task.root / "some"), epochs=4, batch_size=50, lrs=(1e-2,)).model_dump(mode="json")
    fields = {
        "model": {"size": "rung-24", "image_size": 8, "patch_size": 2},
        "data": {"sources": [{"path": digits["train"]}]},
        "optimiser": {"batch_size": 32},
        "budgets": [64],
        "validation": {"path": digits["test"], "centre_crop": 1.0},
        "probes": [digits],
    }
    config = run_config(fields, "the test")
    run = RunDir.create(tmp_path / "run", config)
    write_weights(AIM(model_config("rung-24", image_size=8, patch_size=2)).state_dict(), run.model_file(64))
    run.record_row({"images_seen": 64, "val_loss": 1.0, "probes": [{"task": "other", "kind": "linear", "top1": 0.5}]})
    return run


def test_probing_writes_files_and_its_part_of_the_row(run: RunDir) -> None:
    entries = answer("probe", run.path, "--device", "cpu")
    assert [entry["kind"] for entry in entries] == ["linear", "attentive", "knn"]
    (row,) = run.read_rows()
    assert [probe["task"] for probe in row["probes"]] == ["digits", "digits", "digits", "other"]
    assert row["val_loss"] == 1.0
    (path,) = run.probes_dir(64).glob("digits-*.json")
    written = path.stat().st_mtime_ns
    assert answer("probe", run.path, "--device", "cpu") == entries
    assert path.stat().st_mtime_ns == written  # done once, not again
    assert len(list(run.probes_dir(64).iterdir())) == 2  # and the attentive head


def in_row(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Printed entries as the row of their budget has them."""
    return [{name: value for name, value in entry.items() if name != "images_seen"} for entry in entries]


def test_a_run_that_is_held_is_neither_probed_nor_given_baselines(run: RunDir) -> None:
    before = run.read_rows()
    with run.evaluation.hold():  # as the program that evaluates it, or another probe, does
        for words in (["probe", run.path], ["baseline", "raw-pixels", "--like", run.path]):
            assert str(run.path) in refused(*words, "--device", "cpu", "--kind", "knn")
    assert not (run.path / "probes").exists()
    assert not (run.path / "baselines").exists()
    assert run.read_rows() == before


def test_what_was_found_on_other_weights_is_not_theirs(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    config, (row,) = run.load_config(), run.read_rows()
    entries = answer("probe", run.path, "--device", "cpu", "--kind", "knn")
    run.results.unlink()
    update_row(run, config, 64)  # all of a row that is lost and is not in the weights' file is in the others
    assert run.read_rows()[0]["probes"] == in_row(entries)
    other = AIM(model_config("rung-24", image_size=8, patch_size=2))
    other.init_weights(1)
    write_weights(other.state_dict(), run.model_file(64))
    run.record_row(row | {WEIGHTS_CRC32: 1})
    update_row(run, config, 64)
    assert run.read_rows() == [row | {WEIGHTS_CRC32: 1}]
    next(run.probes_dir(64).glob("digits-*.json")).write_text('{"probes": [3]}')
    update_row(run, config, 64)  # a damaged file is named, and is none
    assert "damaged" in caplog.text


def test_imported_weights_are_probed_like_any_run(task: Any, tmp_path: Path) -> None:
    released = AIM(model_config("rung-24", image_size=8, patch_size=2)).state_dict()
    torch.save({name: t for name, t in released.items() if "pixel_head" not in name}, tmp_path / "aim.pth")
    files = [str(tmp_path / "aim.pth"), str(tmp_path / "imported")]
    say("weights", "import", *files, "--image-size", 8, "--images-seen", 4096, "--num-heads", 3)
    tasks = tmp_path / "tasks.yaml"
    digits = {"task": "digits", "train": str(task.root / "some"), "test": str(task.root / "test")}
    tasks.write_text(json.dumps([digits | {"kinds": ["knn", "linear"], "lrs": [0.01], "epochs": 4}]))  # JSON is YAML
    imported = str(tmp_path / "imported")
    entries = answer("probe", imported, "--device", "cpu", "--tasks", str(tasks))
    baseline = answer("baseline", "random", "--like", imported, "--device", "cpu", "--tasks", str(tasks))
    # the same seed's weights either way
    assert [entry["top1"] for entry in entries] == [entry["top1"] for entry in baseline]
    (row,) = RunDir(imported).read_rows()
    assert [probe["kind"] for probe in row["probes"]] == [entry["kind"] for entry in entries]
    tasks.write_text("task: digits")
    assert str(tasks) in refused("probe", imported, "--tasks", str(tasks))


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (["--images-seen", "7"], "no saved budget of 7 images; it has 64"),
        (["--task", "cats"], "no task 'cats'; its tasks: digits"),
        (["--task", "digit"], "did you mean 'digits'?"),
        (["--kind", "svm"], "kinds.0"),
    ],
)
def test_mistakes_are_one_sentence(run: RunDir, arguments: list[str], subject: str) -> None:
    assert subject in refused("probe", run.path, "--device", "cpu", *arguments)


LEAVES_GROUP = """
import atexit, os, torch.distributed
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(77))
from aimscale.harness.probe.features import extraction, tasks
from aimscale.harness.probe.heads import training
from aimscale.sweeps.cli.main import main
main()
"""
# The command; exits with 77 when it ends inside its process group, where gloo's threads abort it now and then.


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.0])
def test_two_ranks_get_the_numbers_of_one(run: RunDir, share: float) -> None:
    words = ["probe", str(run.path), "--device", "cpu", "--json"]
    # a process of its own, as each rank is: what other tests leave in this one must not tell here
    alone = json.loads(subprocess.run([sys.executable, "-m", "aimscale", *words], check=True, stdout=PIPE).stdout)
    shutil.rmtree(run.path / "probes")
    # without a cache also one block set in each round, and few images at a time
    rounds = "pass" if share else "tasks.HEADS_SHARE = 1e-12; training.WORKING_GB = 1e-4"
    program = LEAVES_GROUP.replace("main()", f"extraction.CACHE_SHARE = {share}; {rounds}; main()")
    command = [sys.executable, "-c", program, *words]
    processes = start_ranks(command, 2)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    together = json.loads(outputs[0])
    assert outputs[1] == ""  # rank 0 speaks
    for one, two in zip(alone, together, strict=True):
        assert one["top1"] == pytest.approx(two["top1"], abs=0.01)  # sums in another order: one or two of 400 images
        assert {k: v for k, v in one.items() if k.startswith("num")} == {
            k: v for k, v in two.items() if k.startswith("num")
        }
