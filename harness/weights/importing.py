"""A released backbone becomes a finished run directory."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from aimscale.aim.config import RELEASED_SIZES
from aimscale.aim.weights import (
    BACKBONE,
    NUM_HEADS,
    PROBE,
    WeightsError,
    check_shapes,
    identify,
    model_shapes,
    probe_state,
    read_weights,
    write_weights,
)
from aimscale.harness.probe.released import RELEASED_HEAD
from aimscale.harness.run.config import ModelSection, RunConfig, run_config
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import write_text, written_dir_aside
from aimscale.harness.run.provenance import record_start
from aimscale.harness.run.row import describe

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
    image_size: int,
    images_seen: int | None,
    num_heads: int | None = None,
    head: Path | None = None,
) -> RunDir:
    """Turn a released backbone into a finished run directory.

    Args:
        source: `.pth` or `.safetensors` with `preprocessor.*` and `trunk.*` under released names.
        image_size: side of the images, pixels, which the file does not tell.
        images_seen: D; None takes the published number of that size.
        num_heads: attention heads, which shapes do not tell; None takes those of a published size or of our own export.
        head: file of a released attentive probe `head.*`; None keeps the one in `source`, if there is one.

    Raises:
        WeightsError: an unreadable file, one that is no AIM backbone, or a head that does not fit.
        RunDirError: `run_path` exists.
    """
    if run_path.exists():
        raise RunDirError(f"{run_path} exists already; choose another directory for the imported weights")
    state = read_weights(source)
    config = identify(source, image_size=image_size, num_heads=num_heads)
    section = ModelSection(
        size=config.name,
        image_size=image_size,
        patch_size=config.patch_size,
        channels=config.channels,
        head_rule="released",
    )
    images_seen = PUBLISHED_IMAGES_SEEN.get(section.size) if images_seen is None else images_seen
    if images_seen is None:
        raise WeightsError(f"{source} is no published size ({section.size}); say --images-seen, its training images")
    if head is None:
        kept_head = probe_state(state, config, source) if f"{PROBE}linear.weight" in state else {}
    else:
        kept_head = probe_state(read_weights(head), config, head)
    body = {name: tensor for name, tensor in state.items() if not name.startswith(PROBE)}
    wanted = {name: shape for name, shape in model_shapes(config).items() if name.startswith(BACKBONE)}
    check_shapes(body, wanted, source)
    run_config = _published_recipe(section, images_seen)
    origin = {"file": str(source.resolve()), "bytes": source.stat().st_size, "sha256": _sha256(source)}
    with written_dir_aside(run_path) as folder:
        run = RunDir(folder)
        if kept_head:
            write_weights(kept_head, run.path / RELEASED_HEAD)
        metadata = {"format": "pt", "imported_from": source.name, NUM_HEADS: str(config.num_heads)}
        write_weights(body, run.model_file(images_seen), metadata)
        write_text(run.config, run_config.to_yaml())
        run.record_row(_row(run_config, images_seen))
        run.write_status(state="finished", images_seen=images_seen, step=images_seen // 4096)
        record_start(run, {"imported": origin})
    return RunDir(run_path)


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
