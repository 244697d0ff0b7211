"""Shell completion as a shell asks for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aimscale.sweeps.cli.main import VERBS

SHELLS = ("bash", "zsh", "fish")


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


def test_bash_offers_every_verb(command: Path, tmp_path: Path) -> None:
    assert complete(command, "aimscale ", tmp_path) == list(VERBS)


def test_bash_offers_the_options_of_a_verb_and_of_a_verb_inside_one(command: Path, tmp_path: Path) -> None:
    assert {"--on", "--dry-run", "--slots", "--root"} <= set(complete(command, "aimscale launch demo --", tmp_path))
    assert {"--size", "--steps"} <= set(complete(command, "aimscale bench train --", tmp_path))


def test_bash_offers_the_values_of_an_option(command: Path, tmp_path: Path) -> None:
    assert complete(command, "aimscale launch demo --on ", tmp_path) == ["local", "slurm"]


def test_bash_offers_sweep_files_presets_and_launched_sweeps(command: Path, tmp_path: Path) -> None:
    (tmp_path / "mysweep.yaml").touch()
    (tmp_path / "aimscale-runs" / "earlier").mkdir(parents=True)
    (tmp_path / "aimscale-runs" / "earlier" / "sweep.yaml").touch()
    offered = complete(command, "aimscale status ", tmp_path)
    assert {"mysweep.yaml", "demo", "aim-paper", "earlier"} <= set(offered)
    assert complete(command, "aimscale status e", tmp_path) == ["earlier"]


def test_an_unknown_verb_is_no_error_while_typing(command: Path, tmp_path: Path) -> None:
    complete(command, "aimscale lanch --", tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_is_shown_and_installed(command: Path, shell: str) -> None:
    env = environment(command)
    shown = subprocess.run([command, "--show-completion", shell], env=env, capture_output=True, text=True, check=True)
    assert f"_AIMSCALE_COMPLETE=complete_{shell}" in shown.stdout
    done = subprocess.run([command, "--install-completion", shell], env=env, capture_output=True, text=True, check=True)
    match = re.search(r"installed in (\S+)", done.stdout)
    assert match is not None
    assert Path(match[1]).read_text().strip() == shown.stdout.strip()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_get_verbs_with_their_lines(command: Path, shell: str) -> None:
    env = environment(command) | {
        "_AIMSCALE_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "aimscale ",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    out = subprocess.run([command], env=env, capture_output=True, text=True, check=True)
    for verb, (_, line) in VERBS.items():
        assert re.search(rf"{verb}\W+{line[:10]}", out.stdout), verb
    assert out.stderr == ""
