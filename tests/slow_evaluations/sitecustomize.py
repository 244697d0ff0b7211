"""On the PYTHONPATH, it makes probe and evaluation jobs save each step of their heads, and takes them long at first.

So a test that stops such a job meets it in its work on any machine. What Slurm starts again is as fast as ever.
"""

import os
import sys
import time

if {"aimscale.harness.probe.job", "aimscale.harness.train.evaluation_job"} & set(sys.orig_argv):
    from aimscale.harness.probe.heads import progress

    progress.SAVE_EVERY_S, progress.SAVE_RATIO = 0.0, 0
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        is_due = progress.StepSaver.is_due

        def slowly(self: progress.StepSaver) -> bool:
            time.sleep(0.3)
            return is_due(self)

        progress.StepSaver.is_due = slowly  # type: ignore[method-assign]
