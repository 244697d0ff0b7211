"""Entry point `python -m aimscale.harness.train RUN_DIR`, which launchers start directly, by torchrun or in Slurm."""

from aimscale.aim.errors import log_to_console
from aimscale.harness.run.failures import run_worker
from aimscale.harness.train.run import train

log_to_console()
run_worker(train, "aimscale.harness.train RUN_DIR", max_paths=1)
