"""Published results and our own baselines, beside the runs."""
