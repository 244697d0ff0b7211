"""Compute-optimal size and data by two approaches."""
