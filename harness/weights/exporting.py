"""A budget of a run becomes a file under released names, with a card that says what it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.cost import param_count
from aimscale.aim.weights import NUM_HEADS, WeightsError, backbone_state, probe_state, read_weights, write_weights
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import write_text, written_dir_aside


def export_weights(run: RunDir, images_seen: int, out: Path, *, probe_file: Path | None) -> list[Path]:
    """Write a budget's backbone under released names: `model.safetensors`, `model.pth` and `README.md` in `out`.

    Args:
        probe_file: an attentive probe (`harness.probe.files.probe_head`) to add as `head.*`.

    Raises:
        WeightsError: `out` exists, or a file cannot be read.
    """
    if out.exists():
        raise WeightsError(f"{out} exists already; choose another folder for the export")
    config = run.load_config()
    model = model_config(**dict(config.training.model), target=config.training.objective.target)
    state = backbone_state(read_weights(run.model_file(images_seen)), model)
    if probe_file is not None:
        state |= probe_state(read_weights(probe_file), model, probe_file)
    rows = [row for row in run.read_rows() if row["images_seen"] == images_seen]
    with written_dir_aside(out) as folder:
        metadata = {"format": "pt", "run_id": config.run_id, NUM_HEADS: str(model.num_heads)}
        write_weights(state, folder / "model.safetensors", metadata)
        write_weights(state, folder / "model.pth")
        write_text(folder / "config.json", json.dumps(dataclasses.asdict(model), indent=1) + "\n")
        write_text(folder / "README.md", model_card(config, model, images_seen, rows[0] if rows else {}))
    return sorted(out.iterdir())


def model_card(config: RunConfig, model: ModelConfig, images_seen: int, row: Mapping[str, Any]) -> str:
    """Markdown: what the model is, how it was trained, what was measured, and what it must not be taken for."""
    training, optimiser, params = config.training, config.training.optimiser, param_count(model)
    loss = row.get("val_loss")
    lines = [
        f"# {model.name}, {images_seen:,} images",
        "",
        f"An autoregressive image model (AIM, arXiv 2401.08541) trained by aimscale; run `{config.run_id}`.",
        "",
        f"- Trunk: width {model.width}, {model.depth} blocks, {model.num_heads} heads, {params.trunk:,} parameters "
        f"(+ {params.preprocessor:,} in the patch embedding). The pixel head ({params.head:,}) is not in the file.",
        f"- Input: {model.channels} x {model.image_size} x {model.image_size} pixels, patches of {model.patch_size}, "
        "ImageNet mean and standard deviation.",
        f"- Data: {', '.join(f'{source.path} ({source.probability:g})' for source in training.data.sources)}; "
        f"unique images: {training.data.unique_images or 'all'}.",
        f"- Objective: next patch, {model.patch_order} order, {model.target} pixels, prefix "
        f"{training.objective.prefix}.",
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
