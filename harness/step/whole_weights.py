"""The float32 weights of an engine as a whole, gathered from its ranks: copied into a model, or written to one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.files import atomic_write
from aimscale.harness.step.checkpoint import write_safetensors
from aimscale.harness.step.engine import Engine, Fragment, fragment_of, part_of


def copied_model(engine: Engine, group: Group, dtype: torch.dtype) -> AIM:
    """Copy the engine's float32 weights into a model of this type, whole on every rank's device.

    All ranks call this together. It takes the bytes of its weights and of the largest one in float32, and shares no
    memory with the trained model, which measurements therefore cannot change.
    """
    with torch.device("meta"):
        model = AIM(engine.config)
    model = model.to(dtype).to_empty(device=group.device).requires_grad_(False).eval()
    model.fill_constants()
    for fragment, whole in _whole_weights(engine, group):
        model.get_parameter(fragment.name).copy_(whole.view(fragment.shape))
    return model


def _whole_weights(engine: Engine, group: Group) -> Iterator[tuple[Fragment, Tensor]]:
    """Yield the float32 weights one after the other, flat, on the device, whole on every rank; each until the next."""
    fragments = engine.fragments()
    if group.world_size == 1 or engine.options.zero_stage == 0:
        for fragment in fragments:
            yield fragment, fragment_of(fragment.flat, fragment)
        return
    buffer = torch.empty(max(fragment.shape.numel() for fragment in fragments), device=group.device)
    for fragment in fragments:
        whole = buffer[: fragment.shape.numel()].zero_()
        if fragment.numel:
            part_of(whole, fragment).copy_(fragment_of(fragment.flat, fragment))
        torch.distributed.all_reduce(whole.view(torch.int32))
        yield fragment, whole


def save_weights(path: Path, engine: Engine, group: Group, metadata: dict[str, str] | None = None) -> None:
    """Write the float32 weights alone, under the model's own names, to one file; all ranks call this together.

    Rank 0 gathers and writes them one by one, under a temporary name first.
    """
    shapes = {fragment.name: tuple(fragment.shape) for fragment in engine.fragments()}
    # a tensor that numpy has seen cannot free its memory
    gathered = (whole.to("cpu", copy=True) for _, whole in _whole_weights(engine, group))
    if group.is_first:
        with atomic_write(path) as partial:
            write_safetensors(partial, shapes, gathered, metadata)
    else:
        for _ in _whole_weights(engine, group):
            pass
    group.wait()
