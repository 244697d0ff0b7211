"""One folder that others can cite and recompute: write it, and check it on any machine."""
