"""`aimscale bench gpu`, rehearsed on a CPU with small sizes: its parts run, and one that fails stops no other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from aimscale.harness.bench import gpu


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_ends_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, parts = "train w16-d2 on 2, ZeRO 1", gpu.parts  # the same program with another number
    monkeypatch.setattr(gpu, "parts", lambda *args, **how: [p for p in parts(*args, **how) if p.name != other])
    done = gpu.run(tmp_path, rehearse=True)
    assert done == json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["problem"] for name, part in done["parts"].items()} == dict.fromkeys(done["parts"], "")
    on_two = "train w16-d2 on 2, ZeRO 2"
    others = {"doctor", "tests", "tests of 2 ranks", "train w16-d2 auto", "sweep", "status", "loader"}
    assert done["parts"].keys() == {on_two, *others}
    step = done["parts"][on_two]["result"]
    assert (step["world_size"], step["zero_stage"]) == (2, 2)
    assert step["images_per_s"] > 0
    for name in ("tests", "tests of 2 ranks"):  # those that need no GPU
        assert re.search(r"[1-9]\d* passed", done["parts"][name]["result"][-1])
    assert [run["state"] for run in done["parts"]["status"]["result"]["runs"]] == ["finished"]


IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        "good": "print('{\"a\": 1}')",
        "bad": "raise SystemExit('no driver')",
        "slow": "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('in order')))"
        "; time.sleep(60)",
        "parent": f"import os, subprocess, time; subprocess.Popen(['sleep', '3600']); {IGNORE}; time.sleep(3600)",
    }
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    parts = [gpu.Part(name=name, words=[sys.executable, "-c", code], limit_s=5) for name, code in programs.items()]
    monkeypatch.setattr(gpu, "parts", lambda *_, **__: parts)
    found = gpu.run(tmp_path)["parts"]
    assert found["good"]["result"] == {"a": 1}
    assert found["bad"]["problem"] == "exit code 1: no driver"
    assert found["slow"]["problem"] == "not done after 5 s"
    assert found["slow"]["result"] == ["in order"], "it could end its own processes"
    assert found["parent"]["problem"], "its child, which holds the pipe that is read, is not waited for"
    monkeypatch.setattr(gpu, "TOTAL_S", 0)
    assert gpu.run(tmp_path)["parts"]["good"]["problem"] == "no time was left"
