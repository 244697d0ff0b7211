"""Command-line verbs of one run: train, probe, data, weights, bench."""
