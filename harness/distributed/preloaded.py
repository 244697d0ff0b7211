"""What the first start of an engine imports, imported as soon as this module is: for a server of forks.

PyTorch loads `torch._dynamo` with the first optimiser and its Python operators with the first tensor of the meta
device, which takes twice as long as all of a small run's own start.
"""

import torch

from aimscale.harness.distributed.group import import_deepspeed

deepspeed = import_deepspeed()
torch.optim.AdamW(torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu").parameters())
