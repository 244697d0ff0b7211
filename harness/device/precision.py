"""Types of numbers, by the `precision` of a configuration."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""`precision` -> type in which a model computes."""
