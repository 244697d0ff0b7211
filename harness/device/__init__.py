"""Devices of a run: ranks, memory, and the peaks that MFU is stated against."""
