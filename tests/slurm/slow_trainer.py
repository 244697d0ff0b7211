"""The real trainer with steps slow enough, on its first attempt, for a fault to hit one, and with faults of its own.

    STEP_S=0.2 FAULT=crash|hog|stop python slow_trainer.py RUN_DIR

`crash` raises at the first step, `hog` takes two gigabytes then; both only while the run directory has no file
`healthy`. `stop` stops rank 1 of the first attempt at its sixth step, as a node that hangs does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from aimscale.harness.run import watch
from aimscale.harness.run.directory import RunDir
from aimscale.harness.step.engine import Engine
from aimscale.harness.train import attempt as train

step = Engine.step
num_steps = 0
hoard: list[bytes] = []


def slow_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
    global num_steps
    num_steps += 1
    if RunDir(sys.argv[1]).read_status().attempt == 1:
        time.sleep(float(os.environ["STEP_S"]))
        if os.environ.get("FAULT") == "stop" and os.environ["RANK"] == "1" and num_steps == 6:
            os.kill(os.getpid(), signal.SIGSTOP)
    if num_steps == 1 and not (Path(sys.argv[1]) / "healthy").exists():
        if os.environ.get("FAULT") == "crash":
            raise RuntimeError("the user's own code is wrong")
        if os.environ.get("FAULT") == "hog":
            hoard.append(b"x" * 2_000_000_000)
            time.sleep(20)
    return step(self, *args, **kwargs)


if __name__ == "__main__":  # loader processes read this file, too
    if os.environ.get("FAULT") == "stop":  # less patient than 40 s
        watch.BEAT_S, watch.SILENCE_S = 1.0, 20.0
    Engine.step = slow_step  # type: ignore[method-assign]
    train.main()
