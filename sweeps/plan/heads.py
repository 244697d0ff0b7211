"""Attention heads that jump between the sizes of a sweep.

A shape without `-h<heads>` takes the widest head of a power of two channels that divides its width and leaves at least
two, so neighbouring widths can differ much: 2 heads of 16 channels at width 32, 13 of 4 at width 52. Attentive probes,
which have as many heads as the trunk, follow that more than they follow the loss (docs/study/cifar.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from aimscale.aim.config import ModelConfig


def uneven_heads(models: Iterable[ModelConfig]) -> dict[str, str]:
    """Size -> warning, where a narrower size has more than twice as many heads, or heads more than twice as wide."""
    sizes = sorted({model.name: model for model in models}.values(), key=lambda model: model.width)
    found = {}
    for size in sizes:
        narrower = [each for each in sizes if each.width < size.width]
        odd = [e for e in narrower if e.num_heads > 2 * size.num_heads or e.head_dim > 2 * size.head_dim]
        if odd:
            found[size.name] = (
                f"{size.name} has {_heads(size)}, the narrower {odd[-1].name} {_heads(odd[-1])}: loss and attentive "
                "probes follow heads, too; end the sizes' names in -h<heads> to choose"
            )
    return found


def _heads(model: ModelConfig) -> str:
    return f"{model.num_heads} attention heads of {model.head_dim} channels"
