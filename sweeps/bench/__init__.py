"""Benchmarks of what surrounds runs: overheads of sweeps, probing at scale, and what faults do."""
