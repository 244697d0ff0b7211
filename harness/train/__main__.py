"""Entry point `python -m aimscale.harness.train RUN_DIR`, which launchers start directly, by torchrun or in Slurm."""

from aimscale.harness.train.attempt import main

main()
