"""A released backbone, or a checkpoint of the authors' trainer, becomes a finished run directory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, model_config
from aimscale.aim.model import AIM
from aimscale.aim.trainer_names import NORM_EPS, is_of_trainer, to_released
from aimscale.aim.weights import (
    NUM_HEADS,
    PROBE,
    WeightsError,
    identify,
    read_weights,
    released_probe_shapes,
    write_weights,
)
from aimscale.harness.probe.released import RELEASED_HEAD, HeadBlocks, released_blocks
from aimscale.harness.run.config import ModelSection, RunConfig, run_config
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import write_text, written_dir_aside
from aimscale.harness.run.provenance import record_start
from aimscale.harness.train.budget import describe
from aimscale.harness.weights.contents import check_shapes, stream_safetensors

PUBLISHED_IMAGES_SEEN = {
    "aim-600M": 500_000 * 4096,
    "aim-1B": 1_200_000 * 4096,
    "aim-3B": 1_200_000 * 4096,
    "aim-7B": 1_200_000 * 4096,
}
"""Iterations x batch of the released models (paper, Table 9 and section 4)."""
PUBLISHED_DATA = "DFN-2B+ (0.8 DFN-2B, 0.2 ImageNet-1k; not part of this project)"
"""Stands where an imported run's training data would be named."""


def import_weights(
    source: Path,
    run_path: Path,
    *,
    size: str | None,
    image_size: int,
    images_seen: int | None,
    num_heads: int | None = None,
    head: Path | None = None,
    head_blocks: HeadBlocks = "last",
) -> RunDir:
    """Turn a released backbone, or a checkpoint of the authors' trainer, into a finished run directory.

    Args:
        source: `.pth` or `.safetensors` with `preprocessor.*` and `trunk.*` under released names; or with q, k, v apart
            and `head.decoder_*`, whose pixel head comes along.
        size: named size; None takes the one whose shapes fit.
        image_size: side of the images, pixels, which the file does not tell.
        images_seen: D; None takes the published number of that size.
        num_heads: attention heads, which shapes do not tell; None takes those of a published size or of our own export.
        head: file of a released attentive probe `head.*`; None keeps the one in `source`, if there is one.
        head_blocks: the blocks that it reads: the last six, or the published best ones.

    Raises:
        WeightsError: an unreadable file, one that is not the backbone of `size`, or a head that does not fit.
        RunDirError: `run_path` exists.
    """
    if run_path.exists():
        raise RunDirError(f"{run_path} exists already; choose another directory for the imported weights")
    found = identify(source, image_size=image_size, num_heads=num_heads)
    state = read_weights(source)
    of_trainer = is_of_trainer(state)
    state = to_released(state) if of_trainer else state
    pixel_head = {name: tensor for name, tensor in state.items() if name.startswith("pixel_head.")}
    section = ModelSection(
        size=size or found.name,
        image_size=image_size,
        patch_size=found.patch_size,
        channels=found.channels,
        **(_trainer_fields(pixel_head, source) if of_trainer else {"head_rule": "released"}),
    )
    config = model_config(**dict(section))
    if (config.width, config.depth, config.num_heads) != (found.width, found.depth, found.num_heads):
        raise WeightsError(f"{source} holds {found.name}, not {section.size}; leave out --size, or give the other file")
    images_seen = PUBLISHED_IMAGES_SEEN.get(section.size) if images_seen is None else images_seen
    if images_seen is None:
        raise WeightsError(f"{source} is no published size ({section.size}); say --images-seen, its training images")
    kept_head = _released_head(read_weights(head) if head else state, config, head or source, insist=head is not None)
    body = {name: tensor for name, tensor in state.items() if not name.startswith(PROBE)}
    check_shapes(body, config, source, _whole_shapes(config) if pixel_head else None)
    run_config = _published_recipe(section, images_seen)
    origin = {"file": str(source.resolve()), "bytes": source.stat().st_size, "sha256": _sha256(source)}
    with written_dir_aside(run_path) as folder:
        run = RunDir(folder)
        if kept_head:
            blocks = released_blocks(config, head_blocks)
            write_weights(kept_head, run.path / RELEASED_HEAD, {"blocks": json.dumps(blocks)})
        metadata = {"format": "pt", "imported_from": source.name, NUM_HEADS: str(config.num_heads)}
        # joined q, k, v are no mapped file, whose pages could be given back
        stream_safetensors(body, run.model_file(images_seen), metadata, forget=not of_trainer)
        write_text(run.config, run_config.to_yaml())
        run.record_row(_row(run_config, images_seen))
        run.write_status(state="finished", images_seen=images_seen, step=images_seen // 4096)
        record_start(run, {"imported": origin})
    return RunDir(run_path)


def _trainer_fields(pixel_head: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Fields of `model` that a checkpoint of the authors' trainer implies."""
    if "pixel_head.proj_in.weight" not in pixel_head:
        raise WeightsError(
            f"{source} lacks head.decoder_projection.weight, so its pixel head is not whole; give it all"
        )
    blocks = {name.split(".")[2] for name in pixel_head if name.startswith("pixel_head.blocks.")}
    return {
        "head_rule": "released",
        "head_width": len(pixel_head["pixel_head.proj_in.weight"]),
        "head_depth": len(blocks),
        "ln_residual": any(name.endswith(".norm_1.weight") for name in pixel_head),
        "norm_eps": NORM_EPS,
        "qkv_init": "separate",
    }


def _whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model with its pixel head."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in AIM(config).state_dict().items()}


def _released_head(
    state: Mapping[str, Tensor], config: ModelConfig, source: Path, *, insist: bool
) -> dict[str, Tensor] | None:
    """The attentive probe in a file's tensors; None where there is none and none was asked for."""
    head = {name: tensor for name, tensor in state.items() if name.startswith(PROBE)}
    if "head.linear.weight" not in head:
        if insist:
            raise WeightsError(f"{source} holds no {PROBE}linear.weight; give the file of the attentive probe")
        return None
    num_classes = len(head["head.linear.weight"])
    wanted = released_probe_shapes(config, num_classes)
    if "head.linear.bias" in head:
        wanted["head.linear.bias"] = (num_classes,)
    check_shapes(head, config, source, wanted)
    return head


def _published_recipe(section: ModelSection, images_seen: int) -> RunConfig:
    """Configuration of an imported run: the paper's recipe, which is what `RunConfig` defaults to but the schedule."""
    return run_config(
        {
            "model": section.model_dump(),
            "data": {"sources": [{"path": PUBLISHED_DATA}]},
            "objective": {"prefix": "uniform"},
            "optimiser": {"batch_size": math.gcd(images_seen, 4096)},
            "schedule": {"kind": "cosine"},
            "budgets": [images_seen],
            "validation": {"path": "none: validation losses of imported weights are the published ones"},
        },
        "imported weights",
    )


def _row(config: RunConfig, images_seen: int) -> dict[str, Any]:
    """A results row without a loss: what the configuration says, and no measurement."""
    row = describe(config) | {"images_seen": images_seen, "probes": [], "imported": True, "git_commit": None}
    num_tokens = (config.training.model.image_size // config.training.model.patch_size) ** 2
    row["flops_train"] = row["flops_per_image"] * images_seen
    row["flops_6nd"] = 6 * row["params_total"] * num_tokens * images_seen
    return row


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


assert set(PUBLISHED_IMAGES_SEEN) == set(RELEASED_SIZES)
