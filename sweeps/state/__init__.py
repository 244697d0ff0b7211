"""State of each run on disk: its claim, its attempts, and what to do with it next."""
