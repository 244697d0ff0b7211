"""Training of a run: the loop, budgets, validation, and measurements on the way."""
