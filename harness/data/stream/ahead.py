"""On a card, the images of a step are moved and augmented while the step before them is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from aimscale.harness.data.stream.batch import Batch


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
