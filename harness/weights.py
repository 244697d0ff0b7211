"""Official AIM weights in and out: a released file becomes a run directory, a run becomes a released file.

Released are `.pth` files, or what the hub has: one `model.safetensors` (or `pytorch_model.bin`) beside a `config.json`.
Files are mapped into memory, and no pickled code is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimscale.aim.config import ModelConfig
from aimscale.aim.weights import (
    BACKBONE,
    PROBE,
    WeightsError,
    backbone_state,
    check_tensors,
    identify,
    model_shapes,
    probe_state,
    read_weights,
    write_weights,
)
from aimscale.harness.probe.released import RELEASED_HEAD, check_blocks, parse_blocks, read_head_blocks
from aimscale.harness.run.config import RunConfig, build_model_config, run_config
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import atomic_dir, read_file, write_json, write_text
from aimscale.harness.run.init import sha256_of
from aimscale.harness.run.provenance import record_start
from aimscale.harness.run.row import budget_columns
from aimscale.harness.run.schedule import check_weights

PUBLISHED_IMAGES_SEEN = {
    "aim-600M": 500_000 * 4096,
    "aim-1B": 1_200_000 * 4096,
    "aim-3B": 1_200_000 * 4096,
    "aim-7B": 1_200_000 * 4096,
}
"""Images seen of the released models, iterations x batch (paper, Table 9 and section 4)."""
PUBLISHED_DATA = "DFN-2B+ (0.8 DFN-2B, 0.2 ImageNet-1k; not part of this project)"
"""Placeholder for the training data of an imported run."""

MAX_BLOCKS = 10_000
"""Limit on the blocks that a head reads."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weight file in a folder of the hub."""


def weight_file(path: Path) -> Path:
    """Return the weight file in a folder of the hub; any other path is returned as it is."""
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path} holds no {' or '.join(WEIGHT_FILES)}; name the weight file itself")


def read_hub_config(file: Path) -> dict[str, Any]:
    """Read what `config.json` beside a weight file says of an AIM, see `hub_config`; empty if there is none."""
    path = file.with_name("config.json")
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_file(path))
        if not {"img_size", "embed_dim", "num_blocks", "num_heads"} <= values.keys():
            return {}  # of something else
        blocks = values.get("probe_layers", 6)
        if isinstance(blocks, int):  # that many last ones
            blocks = range(values["num_blocks"] - blocks, values["num_blocks"])
        if len(blocks) > MAX_BLOCKS:
            raise ValueError(f"{len(blocks)} blocks")
        numbers = {name: int(values[name]) for name in ("img_size", "embed_dim", "num_blocks", "num_heads")}
        return numbers | {"probe_layers": [int(block) for block in blocks]}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path} does not describe an AIM ({error}); restore it, or move it elsewhere") from error


def hub_config(config: ModelConfig, probe_blocks: Sequence[int], num_classes: int | None) -> dict[str, Any]:
    """Return the contents of `config.json`, from which the authors' `AIMForImageClassification` is built, with or
    without a head."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "embed_dim": config.width,
        "num_blocks": config.depth,
        "num_heads": config.num_heads,
        "probe_layers": list(probe_blocks),
        **({} if num_classes is None else {"num_classes": num_classes}),
    }


def import_weights(
    source: Path,
    run_path: Path,
    *,
    image_size: int | None = None,
    images_seen: int | None = None,
    num_heads: int | None = None,
    head: Path | None = None,
    head_blocks: str | None = None,
) -> RunDir:
    """Turn a released backbone into a finished run directory; what is None follows from `config.json` or the published
    size.

    Args:
        source: weight file, or a folder as on the hub, with `preprocessor.*` and `trunk.*` under released names.
        images_seen: D.
        head: file or folder of a released attentive probe `head.*`; None keeps the one in `source`, if there is one.
        head_blocks: blocks that the head averages, as `parse_blocks` reads them.

    Raises:
        WeightsError: an unreadable file, one that is not a whole backbone, or a head that does not fit.
        ProbeError: blocks that the model does not have, or that nothing tells.
        RunDirError: `run_path` exists.
    """
    if run_path.exists():
        raise RunDirError(f"{run_path} exists already; choose another directory for the imported weights")
    source = weight_file(source)
    hub, state = read_hub_config(source), read_weights(source)
    config = identify(
        state, source, image_size=image_size or hub.get("img_size", 224), num_heads=num_heads or hub.get("num_heads")
    )
    if hub and (hub["embed_dim"], hub["num_blocks"]) != (config.width, config.depth):
        raise WeightsError(
            f"{source} holds {config.name}, and the config.json beside it describes another model; move it"
        )
    images_seen = PUBLISHED_IMAGES_SEEN.get(config.name) if images_seen is None else images_seen
    if images_seen is None:
        raise WeightsError(
            f"{source} is no published size ({config.name}); add --images-seen N, the images it was trained on"
        )
    body = {name: tensor for name, tensor in state.items() if not name.startswith(PROBE)}
    shapes = model_shapes(config)
    check_tensors(body, {name: shape for name, shape in shapes.items() if name.startswith(BACKBONE)}, source)
    run_config = _published_recipe(config, images_seen)
    origin = {"file": str(source.resolve()), "bytes": source.stat().st_size, "sha256": sha256_of(source)}
    with atomic_dir(run_path) as folder:
        run = RunDir(folder)
        if head is not None or f"{PROBE}linear.weight" in state:
            _import_head(source if head is None else weight_file(head), config, head_blocks, run)
        write_weights(body, run.model_file(images_seen), {"format": "pt", "imported_from": source.name})
        write_text(run.config, run_config.to_yaml())
        run.record_row(budget_columns(run_config, images_seen) | {"probes": [], "imported": True, "git_commit": None})
        run.write_status(state="finished", images_seen=images_seen, step=images_seen // 4096)
        record_start(run, {"imported": origin})
    return RunDir(run_path)


def _import_head(file: Path, config: ModelConfig, which: str | None, run: RunDir) -> None:
    """Copy a released attentive probe, and which blocks it averages, into a run directory."""
    state = probe_state(read_weights(file), config, file)
    hub = read_hub_config(file)
    if which is None and not hub:
        raise WeightsError(
            f"{file} does not tell which blocks its head reads; add --head-blocks last, best, or FIRST-LAST"
        )
    blocks = check_blocks(config, hub["probe_layers"]) if which is None else parse_blocks(config, which)
    write_weights(state, run.path / RELEASED_HEAD, {"blocks": json.dumps(blocks)})


def _published_recipe(model: ModelConfig, images_seen: int) -> RunConfig:
    """Build the configuration of an imported run: the paper's recipe, with the released head and cosine."""
    shape = {"image_size": model.image_size, "patch_size": model.patch_size, "channels": model.channels}
    return run_config(
        {
            "model": {"size": model.name, **shape, "head_rule": "released"},
            "data": {"sources": [{"path": PUBLISHED_DATA}]},
            "objective": {"prefix": "uniform"},
            "optimiser": {"batch_size": math.gcd(images_seen, 4096)},
            "schedule": {"kind": "cosine"},
            "budgets": [images_seen],
            "validation": {"path": "none: validation losses of imported weights are the published ones"},
        },
        "imported weights",
    )


def export_weights(run: RunDir, images_seen: int, out: Path, *, probe_file: Path | None) -> list[Path]:
    """Write a budget's backbone and a head as a folder that the authors' `AIMForImageClassification.from_pretrained`
    reads, `model.safetensors` and `config.json`, with the run's own `run.yaml` beside them.

    Args:
        probe_file: an attentive probe to add as `head.*`; None takes the one that came with imported weights, if any.

    Raises:
        WeightsError: `out` exists, or the released layout cannot express the model or its head.
    """
    if out.exists():
        raise WeightsError(f"{out} exists already; choose another folder for the export")
    config = run.load_config()
    model = build_model_config(config.training)
    state = backbone_state(read_weights(check_weights(run, images_seen)), model)
    head_file = probe_file or run.path / RELEASED_HEAD
    blocks, num_classes = parse_blocks(model, "last"), None
    if head_file.is_file():
        head, blocks = probe_state(read_weights(head_file), model, head_file), read_head_blocks(head_file)
        if f"{PROBE}linear.bias" in head:
            raise WeightsError(
                f"the classifier of {head_file} has a bias, which released heads have not; export another"
            )
        num_classes = len(head[f"{PROBE}linear.weight"])
        state |= head
    with atomic_dir(out) as folder:
        write_weights(state, folder / "model.safetensors", {"format": "pt", "run_id": config.run_id})
        write_json(folder / "config.json", hub_config(model, blocks, num_classes))
        write_text(folder / "run.yaml", config.to_yaml())
    return sorted(out.iterdir())
