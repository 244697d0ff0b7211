"""Modules that verbs import on the way: they decide how long a verb takes to start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILING = {"torchvision", "torch._dynamo", "triton"}
"""Modules that take seconds and are needed to train or to decode, not to plan."""
TRAINING = {"torch", "simplejpeg", "PIL", "fsspec"}
"""Modules that an installation which only plans does not have."""


def imported(*arguments: str) -> set[str]:
    """Run a verb that succeeds in a process of its own; names of all modules that it imported."""
    code = (
        "import atexit, sys; atexit.register(lambda: print('', *sys.modules, file=sys.stderr));"
        "from aimscale.sweeps.cli.main import main; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return {*done.stderr.splitlines()[-1].split()}


@pytest.mark.parametrize("verb", [["status"], ["collect"], ["cancel"], ["logs", "rung"]], ids=lambda verb: verb[0])
def test_a_look_at_a_sweep_imports_neither_torch_nor_statistics(
    verb: list[str], write_sweep: Any, stand_in: Any, launch: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    name, *more = verb
    modules = imported(name, str(sweep.source), *more, "--root", str(sweep.root))
    assert "aimscale.sweeps.state.run_state" in modules
    assert not {"torch", "scipy.stats", "aimscale.analysis.fitting", *COMPILING} & modules
    assert not {"pandas", "scipy"} & modules or name == "collect"


@pytest.mark.parametrize("verb", [["plan"], ["launch", "--dry-run"]])
def test_a_plan_opens_all_data_and_compiles_nothing(
    verb: list[str], write_sweep: Any, write_images: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(("train", "validation", "fit", "test")):
        write_images(tmp_path / "data" / name, 100, seed=seed, classes=("red", "blue"))
    kinds = ["linear", "knn"]
    task = {"task": "mine", "train": "data/fit", "test": "data/test", "kinds": kinds, "augmentation": "published"}
    sweep = write_sweep(budgets=[640, 1280, 2560], base={"probes": [task]})
    modules = imported(*verb, str(sweep.source), "--root", str(sweep.root))
    assert "aimscale.harness.data.store.overlap" in modules, "its data were opened"
    assert not {*COMPILING, *(TRAINING if verb == ["plan"] else ())} & modules


def test_data_info_compiles_nothing(write_images: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 4)
    assert not COMPILING & imported("data", "info", str(tmp_path / "mine"))


def test_a_fit_loads_no_statistics_of_scipy(tmp_path: Path) -> None:
    rows = [f"{n},{d},{1 + n**-0.3 + d**-0.3}" for n in (1e6, 4e6, 9e6, 3e7) for d in (1e7, 3e7, 1e8)]
    (tmp_path / "t.csv").write_text("\n".join(["N,D,L", *rows]))
    modules = imported("fit", str(tmp_path / "t.csv"))
    assert not [name for name in modules if name.startswith(("scipy.stats", "torch", "matplotlib"))]
