"""Entry point `python -m aimscale.harness.program RUN_DIR`, which launchers start."""

from aimscale.harness.program.supervisor import supervise
from aimscale.harness.run.failures import run_worker

run_worker(lambda paths: supervise(paths[0]), "aimscale.harness.program RUN_DIR", max_paths=1)
