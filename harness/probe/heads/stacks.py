"""Stacks of probe heads: S block sets x G learning rates (or strengths of L2), stacked in every tensor.

One matrix product trains all of them on the same images, each as if it were alone, with its own loss, gradient
clipping and learning rate. Two exact rearrangements keep that cheap.

- The batch norm of the heads has no affine part, so with the statistics of the training split it is a fixed
  standardisation. It is folded into the query and into the values: tokens are never copied.
- Queries are the same for all images, so the score of token x in head h is (W_k,h^T q_h) x and the pooled value is
  W_v,h (sum_n a_n x_n): keys and values of single tokens are never formed. That is N d H work per token where the
  written-out head needs 2 N d^2, with the same parameters and the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from aimscale.aim.cost import num_queries
from aimscale.aim.probes import BATCH_NORM_EPS, QUERY_STD
from aimscale.harness.probe.features.tasks import BlockSet

LR_END = 1e-5
"""End of the cosine, or the peak if that is lower (AIMv2, Table A2)."""
WARMUP_FRACTION = 0.05
"""Share of the steps that warm up (AIMv2, Table A2: 5 of 100 epochs)."""
CLIP_NORM = 3.0
"""Bound to which each head's own gradient norm is clipped (AIMv2, Table A2)."""
WEIGHT_DECAY = 0.05
"""Decoupled decay of the matrices."""


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of every head on every image, (S, B, G), from logits (S, B, G, K) and labels (B,)."""
    targets = labels[None, :, None].expand(logits.shape[:3])
    return functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none")


class HeadStack(nn.Module):
    """Stack of S x G heads of one kind: `standardise_by` the statistics of the training split, train, and score with
    `forward`."""

    kind: str
    mean: Tensor
    var: Tensor

    def __init__(
        self,
        *,
        grid: Mapping[BlockSet, Sequence[float]],
        width: int,
        num_classes: int,
        num_heads: int,
        generator: torch.Generator,
        device: torch.device,
    ):
        """Make untrained heads on the device.

        Args:
            grid: block sets, and the values (rates or strengths) of the heads on each, equally many.
            width: channels of the features.
            num_heads: attention heads of an attentive one.
            generator: source of the initial weights, on the host.
        """
        super().__init__()
        self.grid = {blocks: tuple(values) for blocks, values in grid.items()}
        self.num_classes = num_classes
        self.register_buffer("mean", torch.zeros(len(grid), width, device=device))
        self.register_buffer("var", torch.ones(len(grid), width, device=device))
        num_values = len(next(iter(self.grid.values()), ()))
        # every head of the grid has the same initial weights, so that only the compared setting differs
        for name, draw in self._start(num_heads, generator).items():
            parameter = draw.expand(len(grid), num_values, *draw.shape).to(device).contiguous()
            self.register_parameter(name, nn.Parameter(parameter))

    def _start(self, num_heads: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw one head's parameters, by name, on the host."""
        raise NotImplementedError

    def standardise_by(self, mean: Tensor, variance: Tensor) -> None:
        """Set the batch norm's mean and (biased) variance, (S, d) each."""
        self.mean.copy_(mean)
        self.var.copy_(variance)

    @property
    def rstd(self) -> Tensor:
        """Reciprocal standard deviation, (S, d)."""
        return (self.var + BATCH_NORM_EPS).rsqrt()

    @property
    def shape(self) -> torch.Size:
        """Numbers of block sets and of heads on each, (S, G)."""
        return next(self.parameters()).shape[:2]

    def losses(self, tokens: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Sum cross-entropies over images (S, B, N, d) with labels (B,), all of one weight, to (S, G)."""
        return (cross_entropies(self(tokens), labels) * weight).sum(1)


class LinearStack(HeadStack):
    """Stack of linear heads: mean over tokens -> batch norm -> linear with bias."""

    kind = "linear"
    weight: nn.Parameter
    bias: nn.Parameter

    def _start(self, num_heads: int, generator: torch.Generator) -> dict[str, Tensor]:
        # zeros: the problem is convex, so the start carries no information and no noise
        weight = torch.zeros(self.num_classes, self.mean.shape[1])
        return {"weight": weight, "bias": weight.new_zeros(self.num_classes)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (S, B, N, d) to logits (S, B, G, K)."""
        vectors = (tokens.float().mean(2) - self.mean[:, None]) * self.rstd[:, None]
        return torch.einsum("sbd,sgkd->sbgk", vectors, self.weight) + self.bias[:, None]


class AttentiveStack(HeadStack):
    """Stack of the released head: batch norm over channels, one learned query, keys and values without bias, linear."""

    kind = "attentive"
    query: nn.Parameter
    key: nn.Parameter
    value: nn.Parameter
    weight: nn.Parameter

    def _start(self, num_heads: int, generator: torch.Generator) -> dict[str, Tensor]:
        width = self.mean.shape[1]
        narrow = (num_heads, width // num_heads)

        def draw(*shape: int, std: float) -> Tensor:
            return torch.randn(shape, generator=generator) * std

        return {
            "query": draw(*narrow, std=QUERY_STD),
            "key": draw(*narrow, width, std=1 / math.sqrt(width)),
            "value": draw(*narrow, width, std=1 / math.sqrt(width)),
            "weight": draw(self.num_classes, width, std=0.01),
        }

    def scoring(self) -> Tensor:
        """Return the vectors whose product with tokens is the score of each query of each head, (S, G, Q, d)."""
        return torch.einsum("shqc,shqcd->shqd", self.query, self.key)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (S, B, N, d) to logits (S, B, G, K)."""
        num_sets, batch, num_tokens, width = tokens.shape
        per_head, per_query = self.query.shape[2:]
        mean, rstd = (each[:, None].expand(*self.shape, -1) for each in (self.mean, self.rstd))
        # the mean shifts all scores of a query alike and drops out of the softmax
        direction = (self.scoring() * per_query**-0.5 * rstd[:, :, None]).flatten(1, 2).to(tokens.dtype)
        scores = tokens.flatten(1, 2) @ direction.mT  # bf16 tokens are multiplied in bf16, all else in fp32
        attention = scores.float().view(num_sets * batch, num_tokens, -1).softmax(dim=1)
        pooled = (attention.mT.to(tokens.dtype) @ tokens.flatten(0, 1)).float()
        pooled = pooled.view(num_sets, batch, -1, width).transpose(1, 2).contiguous()
        value = self.value * rstd[:, :, None, None]
        shift = torch.einsum("shqcd,shd->shqc", value, mean).flatten(2)
        vectors = (pooled @ value.flatten(1, 2).mT).unflatten(1, (-1, per_head))  # (S, G, Q, B, c)
        vectors = vectors.transpose(2, 3).flatten(3) - shift[:, :, None]
        return (vectors @ self.weight.mT).transpose(1, 2)

    def released_state(self) -> dict[str, Tensor]:
        """Return the only head's tensors under released names, as `aim.probes.AttentiveProbe` loads them."""
        at, width = (0, 0), self.mean.shape[1]
        return {
            "cls_token": self.query.detach()[at].reshape(1, 1, width),
            "k.weight": self.key.detach()[at].reshape(width, width),
            "v.weight": self.value.detach()[at].reshape(width, width),
            "linear.weight": self.weight.detach()[at],
            "bn.running_mean": self.mean[0],
            "bn.running_var": self.var[0],
        }


class EfficientStack(AttentiveStack):
    """Stack of efficient heads: multi-query attention pooling without query or key projections, then linear with bias.

    Psomas et al. 2025, arXiv 2506.10178: query q attends to tokens in all d channels and pools its own d / Q channels
    of one value projection: d^2 + Q d + K d + K parameters. The paper's batch norm follows the pooling; here it comes
    before, as in the other probes: the same family of functions, without statistics of what is being trained.
    """

    kind = "efficient"
    bias: nn.Parameter

    def _start(self, num_heads: int, generator: torch.Generator) -> dict[str, Tensor]:
        width = self.mean.shape[1]
        queries = num_queries(width)
        start = super()._start(queries, generator)
        del start["key"]
        query = QUERY_STD * torch.randn(queries, width, generator=generator)
        return start | {"query": query, "bias": torch.zeros(self.num_classes)}

    def scoring(self) -> Tensor:
        """Return the queries themselves."""
        return self.query

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (S, B, N, d) to logits (S, B, G, K)."""
        return super().forward(tokens) + self.bias[:, None]


STACKS: dict[str, type[LinearStack] | type[AttentiveStack]] = {
    stack.kind: stack for stack in (LinearStack, AttentiveStack, EfficientStack)
}
"""Kind -> class of its stack."""
ON_TOKENS = tuple(kind for kind in STACKS if kind != LinearStack.kind)
"""Kinds whose heads attend over tokens; linear ones read their mean."""


def learning_rate(peak: float, step: int, num_steps: int) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to `LR_END` or a lower peak."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, num_steps - warmup))
    low = min(peak, LR_END)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


class StackedAdamW:
    """AdamW (0.9, 0.999) over a stack: each head has its own rate and clipping, and nothing is shared."""

    def __init__(self, stack: HeadStack, *, num_steps: int):
        self._parameters = list(stack.parameters())
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters]
        self._peaks = list(stack.grid.values())
        self._num_steps, self._step = num_steps, 0

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update, and free the gradients."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        squares = sum(gradient.square().flatten(2).sum(2) for gradient in gradients)
        assert isinstance(squares, Tensor)
        scale = (CLIP_NORM / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
        rates = [[learning_rate(peak, self._step, self._num_steps) for peak in peaks] for peaks in self._peaks]
        self._step += 1
        correction1, correction2 = 1 - 0.9**self._step, 1 - 0.999**self._step
        for parameter, gradient, (first, second) in zip(self._parameters, gradients, self._moments, strict=True):
            trailing = (1,) * (parameter.dim() - 2)
            gradient = gradient * scale.view(*scale.shape, *trailing)
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            rate = torch.tensor(rates, device=parameter.device).view(*scale.shape, *trailing)
            if parameter.dim() > 3:  # a matrix
                parameter.mul_(1 - rate * WEIGHT_DECAY)
            denominator = (second / correction2).sqrt_().add_(1e-8)
            parameter.sub_(rate / correction1 * first / denominator)
            parameter.grad = None
