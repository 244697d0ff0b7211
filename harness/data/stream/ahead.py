"""On a card, the images of a step are moved and augmented while the step before them is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream

if TYPE_CHECKING:
    from aimscale.harness.device.distributed import Group


def rank_batches(
    stream: TrainStream, *, group: Group, start: int, stop: int, batch_size: int, micro_batch: int, num_workers: int
) -> Generator[list[Batch]]:
    """`train_batches` of a rank: page-locked and moved a step ahead where it has a card."""
    has_card = group.device.type == "cuda"
    batches = train_batches(
        stream,
        start=start,
        stop=stop,
        batch_size=batch_size,
        micro_batch=micro_batch,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=num_workers,
        pin_memory=has_card,
    )
    return on_device_ahead(batches, group.device) if has_card else batches


def on_device_ahead(batches: Generator[list[Batch]], device: torch.device) -> Generator[list[Batch]]:
    """The same steps with their images on the CUDA device, made one step ahead on a stream of their own."""
    side = torch.cuda.Stream(device)
    ahead: tuple[list[Batch], torch.cuda.Event] | None = None
    with contextlib.closing(batches):
        for step in batches:
            with torch.cuda.stream(side):
                moved = [batch.on(device) for batch in step]
                done = side.record_event()
            if ahead is not None:
                yield _taken(*ahead, device)
            ahead = moved, done
        if ahead is not None:
            yield _taken(*ahead, device)


def _taken(step: list[Batch], done: torch.cuda.Event, device: torch.device) -> list[Batch]:
    """Let the training stream wait for the images, and the allocator know that it reads them."""
    training = torch.cuda.current_stream(device)
    training.wait_event(done)
    for batch in step:
        assert isinstance(batch.images, torch.Tensor)
        batch.images.record_stream(training)
    return step
