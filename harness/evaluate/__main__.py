"""Entry point `python -m aimscale.harness.evaluate RUN_DIR...`, which launchers start, directly or by Slurm."""

from aimscale.aim.errors import log_to_console
from aimscale.harness.evaluate.run import evaluate
from aimscale.harness.run.failures import run_worker

log_to_console()
run_worker(lambda *paths: evaluate(paths), "aimscale.harness.evaluate RUN_DIR...")
