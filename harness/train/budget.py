"""What happens at a budget: weights saved, validation, pictures, probes, and the row of results.

The evaluation is a function of the saved weights: a process that died in the middle of it leaves the weights, and the
next one evaluates them without training again.
"""

from __future__ import annotations

import datetime
import functools
import time
from typing import Any

import torch

from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.backbones import AimBackbone
from aimscale.harness.probe.files import weights_name, with_probes_of_files
from aimscale.harness.probe.protocol import probe_backbone
from aimscale.harness.probe.run import load_budget
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import PreemptedError, StopFlag
from aimscale.harness.run.fence import aside_dir
from aimscale.harness.run.files import fsync_dir, new_dir_aside, publish_dir, write_json
from aimscale.harness.run.provenance import git_commit
from aimscale.harness.run.row import configured_columns
from aimscale.harness.step.checkpoint import save_weights
from aimscale.harness.step.engine import Engine
from aimscale.harness.train.validation import completions, validate, write_npz

ROW_VERSION = 1


def save_budget(
    run: RunDir, engine: Engine, group: Group, *, config: RunConfig, images_seen: int, progress: dict[str, Any]
) -> None:
    """Write `budgets/<images_seen>/` in one step: weights, and the run's progress at that point."""
    final = run.budget_dir(images_seen)
    aside = new_dir_aside(final) if group.is_first else aside_dir(final)
    group.wait()
    save_weights(aside / "model.safetensors", engine, group)
    if group.is_first:
        write_json(
            aside / "model.json",
            {
                "version": ROW_VERSION,
                "run_id": config.run_id,
                "images_seen": images_seen,
                "model": config.training.model.model_dump(mode="json"),
                "target": config.training.objective.target,
                "progress": progress,
            },
        )
        fsync_dir(aside)
        publish_dir(aside, final)
    group.wait()


def evaluate_budget(
    run: RunDir, config: RunConfig, group: Group, flag: StopFlag, *, images_seen: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Validate and probe a budget's saved weights, and record its row; all ranks call this together.

    A signal is obeyed between validation and probes; the weights are saved, and the next start evaluates them.

    Args:
        run: the run directory.
        config: of the run.
        group: the ranks.
        flag: raised by a signal.
        images_seen: the budget.
        facts: columns of the row that training knows: losses, times, counts, device.

    Raises:
        PreemptedError: a signal asked to stop.
    """
    training, evaluation = config.training, config.evaluation
    started = time.monotonic()
    model = load_budget(run, config, images_seen, group.device)
    if training.optimiser.precision == "bf16":
        model.to(torch.bfloat16)  # as it trained
    if group.is_first:
        run.write_status(phase="validate", durable=False)
    _stop_if_asked(group, flag)
    dataset = open_dataset(
        evaluation.validation.path, cache_dir=config.runtime.cache_dir, cache_gb=config.runtime.cache_gb
    )
    losses = validate(model, dataset, evaluation.validation, training.model, group)
    if group.is_first:
        losses.save(run.validation_file(images_seen))
        pictures = completions(model, dataset, evaluation.validation, training.model, group.device)
        write_npz(run.completions_file(images_seen), pictures)
        run.write_status(phase="probe", durable=False)
    num_tokens = model.config.num_tokens
    del model
    backbone: AimBackbone | None = None
    probes: list[dict[str, Any]] = []
    for section in evaluation.probes:
        _stop_if_asked(group, flag)
        if backbone is None:
            load = functools.partial(load_budget, run, config, images_seen, group.device)
            backbone = AimBackbone(load, weights_name(run, config, images_seen))
        probes += probe_backbone(
            backbone,
            section,
            model_section=training.model,
            seed=training.seed,
            out=run.probes_dir(images_seen),
            group=group,
            since=0.0,  # what an earlier attempt or a probe job finished is taken from its file
            pause=lambda: _stop_if_asked(group, flag),
            pools=[source.path for source in training.data.sources],
        )
    row = describe(config) | facts
    evaluation_s = time.monotonic() - started
    row |= {
        "wall_s": facts["wall_s"] + evaluation_s,
        "device_hours": facts["device_hours"] + evaluation_s * group.world_size / 3600,
        "images_seen": images_seen,
        "epochs": images_seen / row["unique_images"],
        "flops_train": row["flops_per_image"] * images_seen,
        "flops_6nd": 6 * row["params_total"] * num_tokens * images_seen,
        "val_loss": losses.loss,
        "val_loss_se": losses.standard_error,
        "val_num_images": len(losses.index),
        "probes": probes,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if group.is_first:
        # a probe job may have finished further tasks meanwhile
        run.update_row(images_seen, lambda _: with_probes_of_files(run, config, row))
        run.write_status(val_loss=losses.loss, durable=False)
    group.wait()
    return row


def _stop_if_asked(group: Group, flag: StopFlag) -> None:
    if group.any(flag.is_raised):
        raise PreemptedError


def describe(config: RunConfig) -> dict[str, Any]:
    """Columns of a row that follow from the configuration and the code alone."""
    commit, is_dirty = git_commit()
    return {
        "schema_version": ROW_VERSION,
        **configured_columns(config),
        "git_commit": f"{commit}{'+dirty' if is_dirty else ''}" if commit else None,
    }
