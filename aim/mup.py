"""Two parametrisations: how initial weights, learning rates and attention scale with the width.

`standard` is the paper's: xavier-uniform matrices, one learning rate, attention scaled by 1 / sqrt(head dim). `mup` is
the maximal-update parametrisation for Adam (Yang et al., "Tensor Programs V", arXiv 2203.03466, Table 3, Definition 4.1
and Appendix D.2), under which a learning rate found on a narrow model carries over to a wide one:

| matrix | reads | initial scale | learning rate |
|---|---|---|---|
| input (patch embedding) | pixels, a constant number | constant | constant |
| hidden | a width | width^-1/2 | 1 / width |
| output (last layer of the head) | a width | 0 | 1 / width |

and attention is scaled by 1 / head dim. Biases and norms have a constant rate. Decoupled weight decay multiplies
weights by 1 - rate x decay, so the decay grows as the rate shrinks and the product stays constant. At the base
widths below the two agree, but for the output's start. Widths are covered; depth is not (assumption: the ladder's depth
grows slowly enough). No factor enters the forward pass but attention's, so weights keep their released meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aimscale.aim.config import ModelConfig

BASE_WIDTH = 256
"""Trunk width (rung-256) at which `mup` equals `standard`."""
BASE_HEAD_WIDTH = 336
"""Pixel-head width at which they agree: rung-256's under the `proportional` rule."""
BASE_HEAD_DIM = 64
"""Attention head dimension at which they agree: that of every rung from rung-128 on."""
BASE_DIM_IN_HEAD = 16
"""Attention head dimension at which they agree in a transformer head: rung-256's."""


@dataclass(frozen=True, kw_only=True)
class MatrixScale:
    """Initial scale and learning-rate factor of one matrix."""

    init_bound: float
    """Bound of the initial values, which are uniform on [-bound, bound]."""
    lr_scale: float


def attention_scale(config: ModelConfig, *, in_head: bool = False) -> float:
    """Return the factor on the product of query and key, in the trunk or in a transformer head."""
    dim, base = config.head_dim, BASE_HEAD_DIM
    if in_head:
        dim, base = config.head.width // (config.head.num_heads or 1), BASE_DIM_IN_HEAD
    return math.sqrt(base) / dim if config.parametrisation == "mup" else 1 / math.sqrt(dim)


def matrix_scale(config: ModelConfig, name: str, fan_in: int, fan_out: int) -> MatrixScale:
    """Return the scales of the matrix that a module's `name` holds (`fan_out` x `fan_in`)."""
    into, out_of = _growth(config, name)
    xavier_at_base = math.sqrt(6 / (fan_in / into + fan_out / out_of))
    starts_at_zero = config.parametrisation == "mup" and name == "pixel_head.proj_out"
    return MatrixScale(init_bound=0.0 if starts_at_zero else xavier_at_base / math.sqrt(into), lr_scale=1 / into)


def _growth(config: ModelConfig, name: str) -> tuple[float, float]:
    """Return how many times wider a matrix's input and output are than at the base width."""
    if config.parametrisation == "standard":
        return 1.0, 1.0
    trunk, head = config.width / BASE_WIDTH, config.head.width / BASE_HEAD_WIDTH
    if name == "preprocessor.patchifier.proj":
        return 1.0, trunk
    if name == "pixel_head.proj_in":
        return trunk, head
    if name == "pixel_head.proj_out":
        return (trunk if config.head.is_linear else head), 1.0
    return (head, head) if name.startswith("pixel_head.") else (trunk, trunk)
