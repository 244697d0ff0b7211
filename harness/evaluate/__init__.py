"""Evaluation of saved budgets: validation and probes, knowing only the run directory."""
