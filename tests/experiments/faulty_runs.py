"""Runs with a fault from half way on: the first half of a sound run is trained once, and goes on with each fault.

`python tests/experiments/faulty_runs.py RUN_DIR OUT` leaves a run directory a fault in OUT, and one without any
("none"), which a resumed run repeats bit for bit. Faults are injected into one process, from image `HALF` on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from aimscale.harness.data.stream.stream import Batch, open_stream
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.schedule import Schedule
from aimscale.harness.train import run as trainer
from aimscale.harness.train.run import train

HALF = 0.5
"""Share of the largest budget at which a fault begins."""
RATE_FACTOR, MIXED_SHARE, NUM_SHARDS = 3.0, 0.5, 8
Change = Callable[[Batch, Any], Batch]


def changed_batches(config: RunConfig, change: Change) -> contextlib.AbstractContextManager[Any]:
    """Change every micro-batch from half way on."""
    start, original = HALF * config.evaluation.budgets[-1], trainer.train_batches

    def batches(stream: Any, **options: Any) -> Generator[list[Batch]]:
        for step in original(stream, **options):
            yield [change(batch, stream) if int(batch.positions[0]) >= start else batch for batch in step]

    return mock.patch.object(trainer, "train_batches", batches)


def high_rate(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Multiply the learning rate by `RATE_FACTOR`."""
    start, original = HALF * config.evaluation.budgets[-1], Schedule.lr

    def lr(self: Schedule, images_seen: int, branch: int | None) -> float:
        return original(self, images_seen, branch) * (RATE_FACTOR if images_seen >= start else 1.0)

    return mock.patch.object(Schedule, "lr", lr)


def mixture(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Take half of the images from another source."""
    fields = config.model_dump(mode="json")
    fields["training"]["data"]["sources"] = [{"path": str(other)}]
    source = open_stream(RunConfig.model_validate(fields))

    def change(batch: Batch, stream: Any) -> Batch:
        images, rows = batch.images.clone(), torch.arange(len(batch)) % 2 == 0
        images[rows] = source.batch(batch.positions[rows].numpy()).images
        return dataclasses.replace(batch, images=images)

    return changed_batches(config, change)


def damaged_shard(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Replace every image of one of `NUM_SHARDS` shards by noise; labels take no part in pre-training."""

    def change(batch: Batch, stream: Any) -> Batch:
        _, samples = stream.locate(batch.positions.numpy())
        rows = torch.from_numpy(samples < stream.unique_images // NUM_SHARDS)
        images, positions = batch.images.clone(), batch.positions[rows].tolist()
        for row, position in zip(torch.nonzero(rows).flatten().tolist(), positions, strict=True):
            noise = np.random.default_rng(position).integers(0, 256, images[row].shape, dtype=np.uint8)
            images[row] = torch.from_numpy(noise)
        return dataclasses.replace(batch, images=images)

    return changed_batches(config, change)


def repeated_order(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Begin the order of images, crops and prefixes anew, as after a resume that forgets its position."""
    start = int(HALF * config.evaluation.budgets[-1])
    return changed_batches(config, lambda batch, stream: stream.batch(batch.positions.numpy() - start))


def no_weight_decay(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Switch weight decay off."""
    original = trainer.Trainer._step

    def step(self: trainer.Trainer, step: Any, position: int, branch: int | None) -> Any:
        if position >= HALF * config.evaluation.budgets[-1]:
            for group in self.engine.adamw.param_groups:
                group["weight_decay"] = 0.0
        return original(self, step, position, branch)

    return mock.patch.object(trainer.Trainer, "_step", step)


def dropped_gradients(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Drop the gradients of one of two ranks: the sum over all images has those of every second one only."""
    original = trainer.Engine.step
    start = HALF * config.evaluation.budgets[-1]

    def step(self: Any, micro_batches: list[Batch], *, num_targets: int, lr: float) -> Any:
        if int(micro_batches[0].positions[0]) < start:
            return original(self, micro_batches, num_targets=num_targets, lr=lr)
        found = original(self, [_half(batch) for batch in micro_batches], num_targets=num_targets, lr=lr)
        return dataclasses.replace(found, loss_sum=2 * found.loss_sum)

    return mock.patch.object(trainer.Engine, "step", step)


def _half(batch: Batch) -> Batch:
    """Keep every second pair of images, whose prefixes are paired."""
    rows = torch.arange(len(batch)) % 4 < 2
    return dataclasses.replace(
        batch, images=batch.images[rows], prefix_lengths=batch.prefix_lengths[rows], positions=batch.positions[rows]
    )


def nothing(config: RunConfig, other: Path) -> contextlib.AbstractContextManager[Any]:
    """Change nothing."""
    return contextlib.nullcontext()


FAULTS = {
    "rate x 3": high_rate,
    "another source": mixture,
    "damaged shard": damaged_shard,
    "repeated order": repeated_order,
    "no weight decay": no_weight_decay,
    "dropped gradients": dropped_gradients,
}


@contextlib.contextmanager
def stopping_at(num_images: float) -> Iterator[None]:
    """Stop training in the block at the first step of the trunk past so many images, saved."""
    original = trainer.Trainer._train

    def trained(self: trainer.Trainer, segment: Any) -> None:
        if segment.branch is None:
            metrics, request = self.recorder.metrics, functools.partial(trainer.Trainer._request, self)
            stop_at = num_images - segment.start + metrics.images_done

            def asked() -> Any:
                return dataclasses.replace(request(), stop=metrics.images_done >= stop_at)

            self._request = asked  # type: ignore[method-assign]
        original(self, segment)

    with mock.patch.object(trainer.Trainer, "_train", trained):
        yield


def train_faulty(sound: Path, out: Path, other: Path, faults: list[str]) -> None:
    """Train the first half of a run once, and its second half with each fault."""
    config = RunDir(sound).load_config()
    half = out / "half"
    if not half.exists():
        RunDir.create(half, config)
        with stopping_at(HALF * config.evaluation.budgets[-1]):
            train(half)
    for name in faults:
        folder = out / name.replace(" ", "-")
        if not folder.exists():
            shutil.copytree(half, folder.with_suffix(".part"))
            with FAULTS.get(name, nothing)(config, other):
                train(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)


def main() -> None:
    """Train a run with each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--other", type=Path, required=True, help="folder of shards of another source")
    parser.add_argument("--faults", nargs="*", default=[*FAULTS])
    options = parser.parse_args()
    train_faulty(options.run, options.out, options.other, options.faults)


if __name__ == "__main__":
    main()
