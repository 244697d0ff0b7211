"""What `aimscale --help` promises."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from aimscale.sweeps.cli.main import VERBS

ROOT = Path(__file__).parents[3]


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
