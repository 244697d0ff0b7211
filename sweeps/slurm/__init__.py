"""Slurm: its commands, and submission of jobs through submitit."""
