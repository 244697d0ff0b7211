"""Execution of a sweep: launches, cancellation, workers, their devices and processes."""
