"""Where the runs of a sweep stand, and their rows in one table."""
