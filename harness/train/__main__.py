"""`python -m aimscale.harness.train RUN_DIR`: what launchers start, alone, by torchrun or in Slurm."""

from aimscale.harness.train.attempt import main

main()
