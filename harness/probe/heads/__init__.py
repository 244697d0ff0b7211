"""Probe heads: stacks of them trained on one pass, neighbours, LoRA, and their scores."""
