"""Rehearsal of a training step: DeepSpeed's memory and collectives at any world size, on a CPU, without the numbers."""
