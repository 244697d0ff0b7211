"""Official AIM weights in and out: a released file becomes a run directory, a run becomes a released file.

Files are copied tensor by tensor through mapped memory, so that importing 7B parameters needs memory for about one
tensor. No pickled code is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, model_config
from aimscale.aim.cost import param_count
from aimscale.aim.weights import (
    BACKBONE,
    NUM_HEADS,
    PROBE,
    TRAINER_NORM_EPS,
    WeightsError,
    backbone_state,
    check_tensors,
    identify,
    is_trainer_state,
    known_heads,
    model_shapes,
    probe_state,
    read_weights,
    to_released,
    write_weights,
)
from aimscale.harness.probe.released import RELEASED_HEAD, HeadBlocks, released_blocks
from aimscale.harness.run.config import ModelSection, RunConfig, run_config
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import atomic_dir, write_text
from aimscale.harness.run.provenance import record_start
from aimscale.harness.run.row import describe, model_of

PUBLISHED_IMAGES_SEEN = {
    "aim-600M": 500_000 * 4096,
    "aim-1B": 1_200_000 * 4096,
    "aim-3B": 1_200_000 * 4096,
    "aim-7B": 1_200_000 * 4096,
}
"""Images seen of the released models, iterations x batch (paper, Table 9 and section 4)."""
PUBLISHED_DATA = "DFN-2B+ (0.8 DFN-2B, 0.2 ImageNet-1k; not part of this project)"
"""Placeholder for the training data of an imported run."""


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
    state = to_released(read_weights(source))
    section, config = _model_of(source, state, size=size, image_size=image_size, num_heads=num_heads)
    images_seen = PUBLISHED_IMAGES_SEEN.get(section.size) if images_seen is None else images_seen
    if images_seen is None:
        raise WeightsError(
            f"{source} is no published size ({section.size}); add --images-seen N, the images it was trained on"
        )
    if head is None:
        kept_head = probe_state(state, config, source) if f"{PROBE}linear.weight" in state else {}
    else:
        kept_head = probe_state(read_weights(head), config, head)
    body = {name: tensor for name, tensor in state.items() if not name.startswith(PROBE)}
    is_whole = any(name.startswith("pixel_head.") for name in body)
    shapes = model_shapes(config)
    wanted = {name: shape for name, shape in shapes.items() if is_whole or name.startswith(BACKBONE)}
    check_tensors(body, wanted, source)
    run_config = _published_recipe(section, images_seen)
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"file": str(source.resolve()), "bytes": source.stat().st_size, "sha256": sha256}
    with atomic_dir(run_path) as folder:
        run = RunDir(folder)
        if kept_head:
            blocks = released_blocks(config, head_blocks)
            write_weights(kept_head, run.path / RELEASED_HEAD, {"blocks": json.dumps(blocks)})
        metadata = {"format": "pt", "imported_from": source.name, NUM_HEADS: str(config.num_heads)}
        write_weights(body, run.model_file(images_seen), metadata)
        write_text(run.config, run_config.to_yaml())
        run.record_row(_row(run_config, images_seen))
        run.write_status(state="finished", images_seen=images_seen, step=images_seen // 4096)
        record_start(run, {"imported": origin})
    return RunDir(run_path)


def describe_weights(path: Path) -> dict[str, Any]:
    """Describe what a weight file holds, from names and shapes alone."""
    state = read_weights(path)
    parts = {"preprocessor": 0, "trunk": 0, "pixel_head": 0, "head": 0, "other": 0}
    for name, tensor in state.items():
        part = name.split(".", 1)[0]
        parts[part if part in parts else "other"] += tensor.numel()
    facts = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "num_tensors": len(state),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "params": {part: count for part, count in parts.items() if count},
    }
    classifier = state.get(f"{PROBE}linear.weight")
    if classifier is not None and classifier.ndim:
        facts["num_classes"] = len(classifier)
    return facts | (_backbone_facts(path, state) if parts["trunk"] else {})


def _backbone_facts(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe the backbone in a weight file."""
    any_heads = identify(path, num_heads=1)
    heads = known_heads(path, any_heads.width, any_heads.depth)
    wanted = {name: shape for name, shape in model_shapes(any_heads).items() if name.startswith(BACKBONE)}
    backbone = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(BACKBONE)}
    return {
        "size": identify(path).name if heads else f"w{any_heads.width}-d{any_heads.depth}",
        "width": any_heads.width,
        "depth": any_heads.depth,
        "num_heads": heads or "not told by the file",
        "patch_size": any_heads.patch_size,
        "is_complete_backbone": backbone == wanted,
    }


def _model_of(
    source: Path, state: Mapping[str, Tensor], *, size: str | None, image_size: int, num_heads: int | None
) -> tuple[ModelSection, ModelConfig]:
    """Infer the model that a file holds, insisting on `size`."""
    found = identify(source, image_size=image_size, num_heads=num_heads)
    of_trainer = is_trainer_state(read_weights(source))
    section = ModelSection(
        size=size or found.name,
        image_size=image_size,
        patch_size=found.patch_size,
        channels=found.channels,
        **(_trainer_fields(state, source) if of_trainer else {"head_rule": "released"}),
    )
    config = model_config(**dict(section))
    if (config.width, config.depth, config.num_heads) != (found.width, found.depth, found.num_heads):
        raise WeightsError(f"{source} holds {found.name}, not {section.size}; leave out --size, or give the other file")
    return section, config


def _trainer_fields(state: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Infer fields of `model` from a checkpoint of the authors' trainer."""
    pixel_head = {name: tensor for name, tensor in state.items() if name.startswith("pixel_head.")}
    projection = pixel_head.get("pixel_head.proj_in.weight")
    if projection is None or not projection.ndim:
        raise WeightsError(
            f"{source} lacks head.decoder_projection.weight, so its pixel head is not whole; give it all"
        )
    blocks = {name.split(".")[2] for name in pixel_head if name.startswith("pixel_head.blocks.")}
    return {
        "head_rule": "released",
        "head_width": len(projection),
        "head_depth": len(blocks),
        "ln_residual": any(name.endswith(".norm_1.weight") for name in pixel_head),
        "norm_eps": TRAINER_NORM_EPS,
        "qkv_init": "separate",
    }


def _published_recipe(section: ModelSection, images_seen: int) -> RunConfig:
    """Build the configuration of an imported run: the paper's recipe, which is the default of `RunConfig` except for
    the schedule."""
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
    """Build a results row without a loss, from the configuration alone."""
    row = describe(config) | {"images_seen": images_seen, "probes": [], "imported": True, "git_commit": None}
    num_tokens = (config.training.model.image_size // config.training.model.patch_size) ** 2
    row["flops_train"] = row["flops_per_image"] * images_seen
    row["flops_6nd"] = 6 * row["params_total"] * num_tokens * images_seen
    return row


assert set(PUBLISHED_IMAGES_SEEN) == set(RELEASED_SIZES)


def export_weights(run: RunDir, images_seen: int, out: Path, *, probe_file: Path | None) -> list[Path]:
    """Write a budget's backbone under released names: `model.safetensors`, `model.pth` and `README.md` in `out`.

    Args:
        probe_file: an attentive probe (`harness.probe.files.probe_head`) to add as `head.*`.
    """
    if out.exists():
        raise WeightsError(f"{out} exists already; choose another folder for the export")
    config = run.load_config()
    model = model_of(config.training)
    state = backbone_state(read_weights(run.model_file(images_seen)), model)
    if probe_file is not None:
        state |= probe_state(read_weights(probe_file), model, probe_file)
    rows = [row for row in run.read_rows() if row["images_seen"] == images_seen]
    with atomic_dir(out) as folder:
        metadata = {"format": "pt", "run_id": config.run_id, NUM_HEADS: str(model.num_heads)}
        write_weights(state, folder / "model.safetensors", metadata)
        write_weights(state, folder / "model.pth")
        write_text(folder / "config.json", json.dumps(dataclasses.asdict(model), indent=1) + "\n")
        write_text(folder / "README.md", model_card(config, model, images_seen, rows[0] if rows else {}))
    return sorted(out.iterdir())


def model_card(config: RunConfig, model: ModelConfig, images_seen: int, row: Mapping[str, Any]) -> str:
    """Write the model card, in Markdown: what the model is, how it was trained, what was measured, and its limits."""
    training, optimiser, params = config.training, config.training.optimiser, param_count(model)
    loss = row.get("val_loss")
    objective = f"next patch, prefix {training.objective.prefix}"
    if model.masked is not None:
        objective = f"{model.num_masked} of {model.num_tokens} patches masked"
    lines = [
        f"# {model.name}, {images_seen:,} images",
        "",
        f"An autoregressive image model (AIM, arXiv 2401.08541) trained by aimscale; run `{config.run_id}`.",
        "",
        f"- Backbone: width {model.width}, {model.depth} blocks, {model.num_heads} heads, {params.trunk:,} parameters "
        f"(+ {params.preprocessor:,} in the patch embedding). The pixel head ({params.head:,}) is not in the file.",
        f"- Input: {model.channels} x {model.image_size} x {model.image_size} pixels, patches of {model.patch_size}, "
        "ImageNet mean and standard deviation.",
        f"- Data: {', '.join(f'{source.path} ({source.probability:g})' for source in training.data.sources)}; "
        f"unique images: {training.data.unique_images or 'all'}.",
        f"- Objective: {objective}, {model.patch_order} order, {model.target} pixels.",
        f"- Optimiser: AdamW, batch {optimiser.batch_size}, peak rate {optimiser.lr_peak:g}, weight decay "
        f"{optimiser.weight_decay:g}, schedule {training.schedule.kind}, {optimiser.precision}.",
        f"- Validation loss: {f'{loss:.4f}' if loss is not None else 'not measured'}.",
        "",
        "Features for probes are raw block outputs with bidirectional attention, without the last norm.",
        "",
    ]
    if row.get("probes"):
        lines += ["| task | probe | blocks | top-1 | 95 % interval | n |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {probe['task']} | {probe['kind']} | {', '.join(map(str, probe['blocks']))} | {probe['top1']:.4f} | "
            f"{probe['top1_lo95']:.4f} to {probe['top1_hi95']:.4f} | {probe['n']} |"
            for probe in row["probes"]
        ]
        lines.append("")
    lines.append("Names and shapes are those of the released AIM models, so code written for them loads these files.")
    return "\n".join(lines) + "\n"
