"""What launches keep of each run: its claim, its attempts, and what to do with it."""
