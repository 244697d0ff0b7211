"""Entry point `python -m aimscale.harness.program RUN_DIR`, which launchers start."""

from aimscale.harness.program.attempt import make_attempts
from aimscale.harness.program.supervisor import Supervisor
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import run_worker

run_worker(lambda path: make_attempts(Supervisor, [RunDir(path)]), "aimscale.harness.program RUN_DIR", max_paths=1)
