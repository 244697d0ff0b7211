"""Training: the loop, the engine, checkpoints, budgets, validation."""
