"""Benchmarks of what surrounds runs: probing at scale, and what faults do."""
