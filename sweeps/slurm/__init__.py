"""Launching on Slurm through submitit."""
