"""The optimiser step: its images, the DeepSpeed engine, and checkpoints of its state."""
