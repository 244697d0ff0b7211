"""Times of runs on this machine's cores, from a second of real steps, loading and evaluation of each.

`python -m aimscale.harness.bench.clock CONFIG...` measures one configuration after another, as its own trainer and
evaluation would execute them, in a folder that vanishes, and remembers what it finds (`harness.device.speed`).
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from aimscale.aim.errors import log_to_console
from aimscale.harness.device.speed import Clock, remember
from aimscale.harness.distributed.group import Group, import_deepspeed
from aimscale.harness.distributed.job import Job, Ranks, execute_with, join_ranks
from aimscale.harness.probe.features.backbones import AimBackbone
from aimscale.harness.probe.features.extraction import extract_features
from aimscale.harness.probe.features.images import open_labelled
from aimscale.harness.probe.heads.knn import NUM_NEIGHBOURS, QUERIES, neighbour_votes
from aimscale.harness.probe.run import load_budget
from aimscale.harness.run.config import RunConfig, load_run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.provenance import process_age_s
from aimscale.harness.run.schedule import Segment
from aimscale.harness.step.checkpoint import load_checkpoint
from aimscale.harness.train.run import Trainer
from aimscale.harness.validation import open_held_out, validate

MEASURED_S = 1.0
"""Time of the steps that are timed, after half as many."""
NUM_IMAGES, NUM_BANK = 384, 8192
"""Number of images of a validation and of an extraction that are timed, and of those that queries are compared with."""


class _Stopwatch:
    """Clock of this process: its processor time where other programs delay it, so that it counts idle cores."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read_s(self) -> float:
        """Return the time since it was made, s."""
        return min(time.perf_counter() - self._began[0], time.process_time() - self._began[1])


def _age_s() -> float:
    """Return the time since this process was started, imports included, by the same rule as `_Stopwatch`."""
    return min(process_age_s(), time.process_time())


def measure(config: RunConfig, ranks: Ranks, folder: Path) -> Clock:
    """Measure the times of a run on one rank."""
    clocks: list[Clock] = []
    execute_with(ranks, RunDir.create(folder, config), lambda job: clocks.append(_measure(config, job)))
    return clocks[0]


def _measure(config: RunConfig, job: Job) -> Clock:
    torch.set_num_threads(config.runtime.num_threads)
    run, batch, budget = job.folder, config.training.optimiser.batch_size, config.evaluation.budgets[0]
    watch = _Stopwatch()
    trainer = Trainer(run, config, job)
    made_s = watch.read_s()
    position = 0

    def steps_s(number: int) -> float:
        """Train so many further steps and return the time of each."""
        nonlocal position
        segment = Segment(start=position, stop=position + number * batch, branch=None, resumes=position > 0)
        trainer.recorder.enter(segment)
        watch, position = _Stopwatch(), segment.stop
        trainer._train(segment)
        return watch.read_s() / number

    first_s, number, step_s = steps_s(1), 2, 0.0
    while number * step_s < MEASURED_S and position < budget:
        number *= 2
        step_s = steps_s(number)
    watch = _Stopwatch()
    trainer._save(position, None)
    trainer._save_budget(budget)
    load_checkpoint(run.checkpoint_dir(position), trainer.engine, job.group)
    budget_s = watch.read_s()
    trainer.writer.close()
    trainer.close()
    validation_s, feature_s = _validation_s(config, run, job.group, budget), _feature_s(config, run, job.group, budget)
    return Clock(
        start_s=made_s + first_s,
        step_s=step_s,
        budget_s=budget_s,
        evaluation_start_s=0.0,
        validation_s=validation_s,
        feature_s=feature_s,
        pair_s=_pair_s(config, job.group) if feature_s else 0.0,
    )


def _validation_s(config: RunConfig, run: RunDir, group: Group, budget: int) -> float:
    """Time the validation of an image with one prefix, s."""
    held_out, model = open_held_out(config, group), load_budget(run, config, budget, group.device)
    indices = held_out.indices[:NUM_IMAGES]
    for number in (16, len(indices)):  # the first time, memory and kernels are new
        held_out.indices = indices[:number]
        held_out._own = np.arange(number)
        watch = _Stopwatch()
        validate(model, held_out, group)
    return watch.read_s() / len(indices) / held_out.section.num_prefixes


def _feature_s(config: RunConfig, run: RunDir, group: Group, budget: int) -> float:
    """Time the features of a labelled image, s; 0 without probes."""
    taken = []
    for section in config.evaluation.probes:
        images = open_labelled(
            section.train, section, config.training.model, config.runtime, config.training.data.max_bad_fraction
        )
        number = min(NUM_IMAGES, len(images))
        images = replace(images, rows=images.rows[:number], labels=images.labels[:number])
        backbone = AimBackbone(lambda: load_budget(run, config, budget, group.device), "clock")
        backbone.use(torch.float32)
        watch = _Stopwatch()
        extract_features(backbone, images, group, precision=section.precision, for_tokens=False)
        taken.append(watch.read_s() / number)
    return sum(taken) / max(1, len(taken))


def _pair_s(config: RunConfig, group: Group) -> float:
    """Time the comparison of two images by k-NN, s."""
    from aimscale.harness.run.config import build_model_config

    width, drawn = build_model_config(config.training).width, torch.Generator().manual_seed(0)
    bank = functional.normalize(torch.randn(NUM_BANK, width, generator=drawn), dim=1)
    watch = _Stopwatch()
    for _ in neighbour_votes(bank, torch.zeros(NUM_BANK, dtype=torch.int64), bank[:QUERIES], NUM_NEIGHBOURS, 10, group):
        pass
    return watch.read_s() / (NUM_BANK * QUERIES)


def main(paths: list[str]) -> None:
    """Measure the configurations in files, and remember their times."""
    evaluation_start_s = _age_s()
    with tempfile.TemporaryDirectory(prefix="aimscale-clock-") as folder, join_ranks(Path(folder), "cpu") as ranks:
        import_deepspeed()
        start_s = _age_s()
        for number, path in enumerate(paths):
            config = load_run_config(Path(path))
            clock = measure(config, ranks, Path(folder) / str(number))
            remember(config, replace(clock, start_s=start_s + clock.start_s, evaluation_start_s=evaluation_start_s))


if __name__ == "__main__":
    log_to_console()
    main(sys.argv[1:])
