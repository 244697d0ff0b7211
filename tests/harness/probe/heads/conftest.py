"""The heads of the stacks as ordinary modules, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aimscale.aim.cost import num_queries
from aimscale.aim.probes import AttentiveProbe
from aimscale.harness.probe.heads.stacks import AttentiveStack, EfficientStack, HeadStack


class Efficient(nn.Module):
    """A batch norm, queries that score whole tokens, a slice of the values for each, and a classifier."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(num_queries(width), width))
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, N, d) -> logits (B, K)."""
        tokens = self.bn(features.transpose(1, 2)).transpose(1, 2)
        attention = (tokens @ self.queries.T * tokens.shape[2] ** -0.5).softmax(dim=1)
        values = self.v(tokens).unflatten(2, (len(self.queries), -1))
        logits: Tensor = self.linear(torch.einsum("bnq,bnqc->bqc", attention, values).flatten(1))
        return logits


class Linear(nn.Module):
    """Mean over tokens, a batch norm and a classifier."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, N, d) -> logits (B, K)."""
        logits: Tensor = self.linear(self.bn(features.mean(dim=1)))
        return logits


def written_out_module(head: HeadStack) -> nn.Module:
    """A stack's only head as an ordinary module with copies of its values, in evaluation mode."""
    width = head.mean.shape[1]
    statistics = {"bn.running_mean": head.mean[0], "bn.running_var": head.var[0]}
    own = {name: parameter.detach()[0, 0] for name, parameter in head.named_parameters()}
    module: nn.Module
    if isinstance(head, EfficientStack):
        module = Efficient(width, head.num_classes)
        state = {"queries": own["query"], "v.weight": own["value"].flatten(0, 1), "linear.weight": own["weight"]}
        state |= {"linear.bias": own["bias"]}
    elif isinstance(head, AttentiveStack):
        module, state = AttentiveProbe(width, len(own["query"]), head.num_classes), head.released_state()
    else:
        module, state = Linear(width, head.num_classes), {f"linear.{name}": value for name, value in own.items()}
    module.load_state_dict(statistics | state | {"bn.num_batches_tracked": torch.tensor(0)})
    return module.eval()


@pytest.fixture
def written_out() -> Callable[[HeadStack], nn.Module]:
    return written_out_module
