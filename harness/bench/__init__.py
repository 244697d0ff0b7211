"""Benchmarks of training and of reading images."""
