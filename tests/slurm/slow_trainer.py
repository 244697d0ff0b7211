"""The real trainer with steps slow enough for a fault to hit one, and with faults of its own.

    STEP_S=0.2 FAULT=crash|hog python slow_trainer.py RUN_DIR

`crash` raises after five steps, `hog` takes a gigabyte; both only while the run directory has no file `healthy`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from harness import train
from harness.engine import Engine

step = Engine.step
num_steps = 0
hoard: list[bytes] = []


def slow_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
    global num_steps
    num_steps += 1
    time.sleep(float(os.environ.get("STEP_S", "0.1")))
    if num_steps == 5 and not (Path(sys.argv[1]) / "healthy").exists():
        if os.environ.get("FAULT") == "crash":
            raise RuntimeError("the user's own code is wrong")
        if os.environ.get("FAULT") == "hog":
            hoard.append(b"x" * 2_000_000_000)
            time.sleep(20)
    return step(self, *args, **kwargs)


Engine.step = slow_step  # type: ignore[method-assign]
train.main()
