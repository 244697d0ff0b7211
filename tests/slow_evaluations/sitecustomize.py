"""On the PYTHONPATH, it makes evaluation jobs long at first: LoRA rests before each step.

So a test that stops such a job meets it in its work on any machine. What Slurm starts again is as fast as ever.
"""

import os
import sys
import time

if sys.orig_argv[-1].endswith("/evaluating") and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from aimscale.harness.probe.heads import lora

    lora.learning_rate = lambda *of: time.sleep(0.3) or learning_rate(*of)  # type: ignore[assignment, func-returns-value]
    from aimscale.harness.probe.heads.stacks import learning_rate
