"""The bar of long work, on a real pseudo-terminal and in a file."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import time
from aimscale.harness.log.progress import Bar
with Bar(every_s={every_s}) as bar:
    for done in range(5):
        bar("packing pets", done, 8, "images")
        time.sleep(0.02)
    bar.say("a result")
    bar("heads", 3, None, "passes")
    {end}
"""


def on_terminal(code: str, out: Path) -> tuple[str, int]:
    """What a process writes to a terminal of 80 columns, its results going to a file."""
    ours, its = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with out.open("wb") as results:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=results, stderr=its, env=env)
    os.close(its)
    said = b""
    with contextlib.suppress(OSError):  # Linux says so when the other end is closed
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    return said.decode(), process.wait(60)


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise KeyboardInterrupt", -2), ("raise ValueError", 1)])
def test_a_terminal_gets_a_bar_that_goes_away_whatever_ends_the_work(end: str, code: int, tmp_path: Path) -> None:
    said, ended = on_terminal(WORK.format(every_s=1000, end=end), tmp_path / "out")
    assert ended == code
    assert "packing pets" in said
    assert "4/8 images" in said
    assert "/s, 0:00:0" in said
    assert "3 passes" in said
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l") >= 0, "the cursor stays hidden"
    assert (tmp_path / "out").read_text() == "a result\n"


def test_a_file_gets_plain_lines_now_and_then() -> None:
    for every_s, expected in ((0, 6), (1000, 0)):
        code = WORK.format(every_s=every_s, end="pass")
        env = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout == "a result\n"
        assert not any(character in done.stderr for character in "\x1b\r")
        assert len(done.stderr.splitlines()) == expected
