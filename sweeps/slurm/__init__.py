"""Slurm: its commands, and submission of jobs."""
