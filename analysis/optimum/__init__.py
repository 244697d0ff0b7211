"""Compute-optimal size and data by three approaches."""
