"""Logistic regression on pooled features, solved instead of trained: a whole grid of L2 at once, by L-BFGS.

The problem is convex, so its solution does not depend on a learning rate, order of images, batch or seed. Heads are
solved in coordinates in which the features have unit covariance (damped by the L2), which takes some thirty passes
instead of a thousand. Zhu et al. 1997 (L-BFGS); Kornblith et al. 2019, arXiv 1805.08974 (this probe).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from aimscale.harness.probe.heads.stacks import LinearStack

MAX_PASSES = 500
"""Maximum number of passes over the images; most heads take thirty, strong features with a weak L2 up to 200."""
TOLERANCE = 1e-5
"""Tolerance, nats: a head is done when another step promises to lower its loss by less."""
NUM_PAIRS = 8
"""Number of previous steps from which the curvature is estimated."""
ARMIJO_SHARE = 1e-4
"""Share of the promised descent that a step must achieve, else it is halved (Armijo)."""
MAX_CHANNELS, MIN_IMAGES_PER_CHANNEL = 4096, 2
"""Limits of the eigendecomposition of the covariance: at most so many channels, and at least so many images per
channel. Beyond them (raw pixels) only variances are equalised: eigenvectors would cost more than the passes they
save."""


def solve(
    stack: LinearStack, covariance: Tensor | None, losses: Callable[[], Tensor], agreed: Callable[[bool], bool]
) -> bool:
    """Give every head of a stack, which starts from zeros, the weights that minimise cross-entropy + L2 / 2 |weight|^2.

    Args:
        stack: its values are the strengths of L2.
        covariance: float32 (S, d, d) of the standardised features; None takes it to be the identity.
        losses: one pass over the images: adds the gradients of all heads to the parameters', returns float64 (S, G).
        agreed: returns whether all ranks say True; ranks whose heads are done join in the passes of the others.

    Returns:
        Whether the heads of all ranks are within the tolerance of their optimum.
    """
    view = _Coordinates(stack, covariance)
    at = torch.zeros(*stack.weight.shape[:2], stack.num_classes * (stack.weight.shape[3] + 1), device=stack.mean.device)
    value, gradient = view.evaluate(at, losses)
    step = torch.ones_like(at[..., :1])
    scale = torch.full_like(step, stack.num_classes)  # the curvature is p (1 - p), with p about 1 / K
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=NUM_PAIRS)
    for _ in range(MAX_PASSES):
        direction = -_inverse_curvature(gradient, scale, pairs)
        promised = _dot(gradient, direction)
        is_done = promised > -2 * TOLERANCE
        if agreed(bool(is_done.all())):
            view.set(at)
            return True
        trial = torch.where(is_done, at, at + step * direction)
        reached, slope = view.evaluate(trial, losses)
        is_better = reached <= value + ARMIJO_SHARE * step * promised + TOLERANCE
        moved, bent = trial - at, slope - gradient
        bend = _dot(moved, bent)
        counts = is_better & (bend > 1e-12)
        pairs.append((moved, bent, torch.where(counts, 1 / bend, 0)))
        scale = torch.where(counts, bend / _dot(bent, bent), scale)
        step = torch.where(is_better, 1, step / 2)
        at, gradient = torch.where(is_better, trial, at), torch.where(is_better, slope, gradient)
        value = torch.where(is_better, reached, value)
    view.set(at)
    return False


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(2, keepdim=True)


def _inverse_curvature(gradient: Tensor, scale: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Apply the two loops of L-BFGS (Nocedal 1980) to every head separately; a pair of weight 0 does not count."""
    out, shares = gradient.clone(), []
    for moved, bent, weight in reversed(pairs):
        shares.append(weight * _dot(moved, out))
        out -= shares[-1] * bent
    out *= scale
    for (moved, bent, weight), share in zip(pairs, reversed(shares), strict=True):
        out += moved * (share - weight * _dot(bent, out))
    return out


class _Coordinates:
    """Coordinates (S, G, K d + K) in which the loss of every head has about the same curvature in all directions."""

    def __init__(self, stack: LinearStack, covariance: Tensor | None):
        self._stack = stack
        l2 = torch.tensor(list(stack.grid.values()), device=stack.mean.device)
        self._l2 = l2.view(*stack.shape, 1, 1)
        if covariance is None:
            self._turn, spread = None, torch.ones_like(stack.mean)[:, None]
        else:
            values, self._turn = torch.linalg.eigh(covariance)
            spread = values.clamp_min(0)[:, None]
        self._scale = (spread[:, :, None] + stack.num_classes * self._l2).rsqrt()  # (S, G, 1, d)

    def set(self, at: Tensor) -> Tensor:
        """Set the heads to these coordinates; returns their L2 penalty (S, G)."""
        stack = self._stack
        scaled = at[..., : -stack.num_classes].view_as(stack.weight) * self._scale
        with torch.no_grad():
            stack.weight.copy_(scaled if self._turn is None else scaled @ self._turn.mT[:, None])
            stack.bias.copy_(at[..., -stack.num_classes :])
        return (self._l2 / 2 * scaled.square()).double().sum((2, 3))

    def evaluate(self, at: Tensor, losses: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluate the value, float64 (S, G, 1), and the gradient (S, G, K d + K)."""
        stack = self._stack
        value = self.set(at) + losses()
        assert stack.weight.grad is not None and stack.bias.grad is not None  # noqa: PT018
        along = stack.weight.grad if self._turn is None else stack.weight.grad @ self._turn[:, None]
        along = along + self._l2 * (at[..., : -stack.num_classes].view_as(along) * self._scale)
        gradient = torch.cat([(along * self._scale).flatten(2), stack.bias.grad], dim=2)
        stack.weight.grad = stack.bias.grad = None
        return value[..., None], gradient
