"""On the PYTHONPATH, it makes steps of first attempts slow enough for a fault to hit one, and adds faults of its own.

STEP_S is the time a step takes longer, in seconds. FAULT=hog takes two gigabytes at the first step while the run
directory has no file `healthy`. FAULT=stop stops rank 1 of the first attempt at its sixth step, as a hung node does.
FAULT=broken ends what starts on node2 at once, as a node with a broken driver does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

num_steps = 0
hoard: list[bytes] = []

if "aimscale.harness.train" in sys.orig_argv[2:4]:  # a run; neither what starts its ranks nor a loader
    if os.environ.get("FAULT") == "broken" and os.environ.get("SLURMD_NODENAME") == "node2":
        sys.exit("CUDA error: uncorrectable ECC error encountered")

    from aimscale.harness.run.directory import RunDir
    from aimscale.harness.step.engine import Engine

    fault, step = os.environ.get("FAULT"), Engine.step

    def slow_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        global num_steps
        num_steps += 1
        run = RunDir(sys.argv[-1])
        if run.read_status().attempt == 1:
            time.sleep(float(os.environ["STEP_S"]))
            if fault == "stop" and os.environ["RANK"] == "1" and num_steps == 6:
                os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "hog" and num_steps == 1 and not (Path(run.path) / "healthy").exists():
            hoard.append(b"x" * 2_000_000_000)
            time.sleep(300)  # until Slurm has looked and killed it, however late it looks
        return step(self, *args, **kwargs)

    Engine.step = slow_step  # type: ignore[method-assign]
