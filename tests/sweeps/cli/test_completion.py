"""Shell completion as a shell asks for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aimscale.sweeps.cli.main import VERBS


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """`aimscale` on the PATH as its own folder; it says on stderr when it imported something heavy."""
    path = tmp_path / "bin" / "aimscale"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\n"
        "import atexit, sys\n"
        "heavy = ('torch', 'deepspeed', 'scipy', 'submitit')\n"
        "atexit.register(lambda: [print('HEAVY', m, file=sys.stderr) for m in heavy if m in sys.modules])\n"
        "from aimscale.sweeps.cli.main import main\n"
        "main()\n"
    )
    path.chmod(0o755)
    return path


def environment(command: Path) -> dict[str, str]:
    home = command.parents[1] / "home"
    home.mkdir(exist_ok=True)
    path = f"{command.parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(home), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def complete(command: Path, line: str, folder: Path) -> list[str]:
    """What bash would offer at the end of the line, by the script that `--show-completion bash` prints."""
    env = environment(command)
    script = subprocess.run([command, "--show-completion", "bash"], env=env, capture_output=True, text=True, check=True)
    words = line.split(" ")
    program = f"""{script.stdout}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
_aimscale_completion aimscale
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    out = subprocess.run(["bash", "-c", program], env=env, cwd=folder, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    return out.stdout.split()


def test_bash_offers_verbs_options_values_and_sweeps(command: Path, tmp_path: Path) -> None:
    (tmp_path / "mysweep.yaml").touch()
    (tmp_path / "aimscale-runs" / "earlier").mkdir(parents=True)
    (tmp_path / "aimscale-runs" / "earlier" / "sweep.yaml").touch()
    assert complete(command, "aimscale ", tmp_path) == list(VERBS)
    assert {"--on", "--dry-run", "--slots", "--root"} <= set(complete(command, "aimscale launch demo --", tmp_path))
    assert complete(command, "aimscale launch demo --on ", tmp_path) == ["local", "slurm"]
    offered = complete(command, "aimscale status ", tmp_path)
    assert {"mysweep.yaml", "demo", "aim-paper", "earlier"} <= set(offered)
    assert complete(command, "aimscale status e", tmp_path) == ["earlier"]
    complete(command, "aimscale lanch --", tmp_path)  # an unknown verb is no error while typing


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_installed(command: Path, shell: str) -> None:
    env = environment(command)
    shown = subprocess.run([command, "--show-completion", shell], env=env, capture_output=True, text=True, check=True)
    done = subprocess.run([command, "--install-completion", shell], env=env, capture_output=True, text=True, check=True)
    match = re.search(r"installed in (\S+)", done.stdout)
    assert match is not None
    assert Path(match[1]).read_text().strip() == shown.stdout.strip()
