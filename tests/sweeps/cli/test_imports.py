"""Modules that verbs import on the way: they decide how long a verb takes to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

COMPILING = {"torchvision", "torch._dynamo", "triton"}
"""Modules that take seconds and are needed to train or to decode, not to plan."""
TRAINING = {"torch", "simplejpeg", "PIL", "fsspec"}
"""Modules that an installation which only plans does not have."""


def imported(*arguments: str, verbs: Sequence[str] = ("",)) -> set[str]:
    """Run verbs that succeed in a process of its own; names of all modules that they imported."""
    code = (
        "import atexit, contextlib, sys; atexit.register(lambda: print('', *sys.modules, file=sys.stderr))\n"
        "from aimscale.sweeps.cli.main import main\n"
        f"for verb in {[verb.split() for verb in verbs]}:\n"
        "    try: main([*verb[:1], *sys.argv[1:], *verb[1:]])\n"
        "    except SystemExit as end: assert not end.code\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return {*done.stderr.splitlines()[-1].split()}


def test_looks_at_a_sweep_import_neither_torch_nor_statistics(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    for verbs, of_tables in ((["status", "logs rung", "cancel"], {"pandas", "scipy"}), (["collect"], set())):
        modules = imported(str(sweep.source), "--root", str(sweep.root), verbs=verbs)
        assert "aimscale.sweeps.state.run_state" in modules
        assert not {"torch", "scipy.stats", "aimscale.analysis.fitting", *COMPILING, *of_tables} & modules


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
    assert "aimscale.harness.data.store.index" in modules, "its data were opened"
    assert not {*COMPILING, *(TRAINING if verb == ["plan"] else ())} & modules


def test_data_info_compiles_nothing(write_images: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 4)
    assert not COMPILING & imported("data", "info", str(tmp_path / "mine"))


def test_a_fit_loads_no_statistics_of_scipy(tmp_path: Path) -> None:
    rows = [f"{n},{d},{1 + n**-0.3 + d**-0.3}" for n in (1e6, 4e6, 9e6, 3e7) for d in (1e7, 3e7, 1e8)]
    (tmp_path / "t.csv").write_text("\n".join(["N,D,L", *rows]))
    modules = imported("fit", str(tmp_path / "t.csv"))
    assert not [name for name in modules if name.startswith(("scipy.stats", "torch", "matplotlib"))]
