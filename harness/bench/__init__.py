"""Benchmarks of training and of reading images, against named limits."""
