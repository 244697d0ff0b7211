"""Tables of a sweep: the status of its runs, and their results."""
