"""Benchmarks of what surrounds runs: overheads of sweeps, and probing at scale."""
