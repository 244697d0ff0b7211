"""What launches keep of each run: its claim, its attempts, the code it runs, and what to do with it."""
