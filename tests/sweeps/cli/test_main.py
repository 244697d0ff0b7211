"""The rules that keep the rooms apart, and what `aimscale --help` promises."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from aimscale.sweeps.cli.main import VERBS

ROOT = Path(__file__).parents[3]
FORBIDDEN = {
    "aim": {"harness", "sweeps", "analysis", "deepspeed"},
    "harness": {"sweeps", "analysis"},
    "analysis": {"aim", "harness", "sweeps", "torch", "deepspeed"},
}


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        crossing = {name for name in imported_modules(path) if name.split(".")[0] in FORBIDDEN[room]}
        assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


@pytest.mark.parametrize(
    "module",
    [
        "aimscale.sweeps.cli.main",
        "aimscale.aim.config",
        "aimscale.aim.cost",
        "aimscale.harness.run.config",
        "aimscale.harness.run.directory",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'deepspeed', 'pandas', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_every_verb_has_its_module() -> None:
    missing = [module for module, _ in VERBS.values() if find_spec(module) is None]
    assert not missing


def test_help_names_every_verb_with_one_line() -> None:
    out = subprocess.run([sys.executable, "-m", "aimscale", "--help"], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n  {verb} " in out.stdout


def test_an_unknown_verb_is_one_sentence_with_the_nearest() -> None:
    out = subprocess.run([sys.executable, "-m", "aimscale", "lanch"], capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert out.stderr == "aimscale: there is no verb 'lanch'; did you mean 'launch'?\n"
