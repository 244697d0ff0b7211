"""Weights in and out, under the names of the released AIM models.

A released model is `preprocessor.*` and `trunk.*` (the backbone) and `head.*` (an attentive probe), in one file or
two. Our own files add `pixel_head.*`, which was never released. Files are mapped into memory; no pickled code is ever
executed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, PixelHeadConfig, model_config, size_of
from aimscale.aim.errors import UserError, some
from aimscale.aim.layers import attention_scale
from aimscale.aim.model import AIM
from aimscale.aim.probes import AttentiveProbe

BACKBONE = ("preprocessor.", "trunk.")
"""Prefixes of a released backbone's names."""
PROBE = "head."
"""Prefix of a released attentive probe's names."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)

Shapes = dict[str, tuple[int, ...]]


class WeightsError(UserError):
    """Weight file that cannot be read or does not hold what the model needs."""


def model_shapes(config: ModelConfig) -> Shapes:
    """Return names and shapes of a model's state; a released backbone holds those whose names begin with `BACKBONE`."""
    with torch.device("meta"):
        return _shapes_of(AIM(config))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map a weight file into memory: tensors on the CPU whose bytes are read on use.

    A file that is not named `.safetensors` is read as a PyTorch state dict (`.pth`, `.pt`, `.bin`).

    Raises:
        WeightsError: no such file, another format, or contents other than named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    is_safetensors = path.suffix == ".safetensors"
    try:
        state: Any = load_file(path) if is_safetensors else torch.load(path, "cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types, pickle's among them, for unreadable files
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        kind = "whole safetensors file" if is_safetensors else "plain PyTorch state dict"
        raise WeightsError(
            f"{path} is not a {kind} ({reason}); download it again, or torch.save(model.state_dict(), path)"
        ) from error
    values = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(value, Tensor) and value.dtype in _DTYPES for value in values):
        raise WeightsError(f"{path} holds more than tensors of fp32, bf16 or fp16; save model.state_dict() alone")
    return state


def write_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with text `metadata`, in place: a reader may see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(values, path, dict(metadata or {}))


def identify(state: Mapping[str, Tensor], where: Path, *, image_size: int, num_heads: int | None = None) -> ModelConfig:
    """Infer the size of a backbone under released names from its shapes, with a linear pixel head.

    Tensors do not tell `image_size`, since positions are computed and not stored, nor the number of attention heads,
    which is known of published sizes.

    Raises:
        WeightsError: there is no patch embedding or no block, or the number of heads is unknown.
        ModelConfigError: shapes that no AIM has.
    """
    patch_embedding = state.get("preprocessor.patchifier.proj.weight")
    depth = len({name.split(".")[2] for name in state if name.startswith("trunk.blocks.")})
    if patch_embedding is None or patch_embedding.ndim != 4 or not depth:
        raise WeightsError(f"{where} is not an AIM backbone: it has no patch embedding or no blocks")
    width, channels, patch_size, _ = patch_embedding.shape
    published = {(wide, deep): heads for wide, deep, heads in RELEASED_SIZES.values()}
    heads = num_heads or published.get((width, depth))
    if heads is None:
        raise WeightsError(
            f"{where} (width {width}, {depth} blocks) is no published size, and no config.json tells its number of "
            "attention heads; add --num-heads N"
        )
    size = size_of(width, depth, heads)
    return model_config(size, image_size=image_size, patch_size=patch_size, channels=channels, head_rule="none")


def load_model(path: Path, config: ModelConfig, *, device: str | torch.device = "cpu") -> AIM:
    """Build a float32 AIM; a released backbone, which has no pixel head, gets an untrained linear one.

    Probe tensors `head.*` in the same file are left alone, see `load_probe`.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith(PROBE)}
    is_backbone = not any(name.startswith("pixel_head.") for name in state)
    if is_backbone:
        linear = PixelHeadConfig(width=config.width, depth=0, is_linear=True)
        config = dataclasses.replace(config, head=linear, masked=None)
    with torch.device("meta"):
        model = AIM(config)
    shapes = _shapes_of(model)
    lacking = [name for name in shapes if is_backbone and not name.startswith(BACKBONE)]
    check_tensors(state, {name: shape for name, shape in shapes.items() if name not in lacking}, path)
    model.to_empty(device=device)
    with torch.no_grad():
        model.load_state_dict({**{name: model.initial_value(name, 0) for name in lacking}, **state})
    model.fill_constants()
    return model


def load_probe(path: Path, config: ModelConfig) -> AttentiveProbe:
    """Build the attentive probe of a released probe file; other tensors in the same file are left alone.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = probe_state(read_weights(path), config, path)
    probe = _probe_on_meta(state, config, path).to_empty(device="cpu")
    probe.load_state_dict({name.removeprefix(PROBE): tensor for name, tensor in state.items()})
    return probe


def probe_state(state: Mapping[str, Tensor], config: ModelConfig, where: Path) -> dict[str, Tensor]:
    """Select and check the attentive probe among some tensors.

    Raises:
        WeightsError: there is none, or one that does not fit the model.
    """
    probe = {name: tensor for name, tensor in state.items() if name.startswith(PROBE)}
    shapes = _shapes_of(_probe_on_meta(probe, config, where))
    check_tensors(probe, {f"{PROBE}{name}": shape for name, shape in shapes.items()}, where)
    return probe


def _probe_on_meta(state: Mapping[str, Tensor], config: ModelConfig, where: Path) -> AttentiveProbe:
    classifier = state.get(f"{PROBE}linear.weight")
    if classifier is None or classifier.ndim != 2:
        raise WeightsError(f"{where} holds no {PROBE}linear.weight; give the file of the attentive probe")
    with torch.device("meta"):
        return AttentiveProbe(
            config.width, config.num_heads, num_classes=len(classifier), bias=f"{PROBE}linear.bias" in state
        )


def backbone_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Select the tensors of a released backbone from one of our states, without copies.

    Released models scale attention by 1 / sqrt(head dim). For a muP model that does not, the ratio of the two scales is
    multiplied into new query weights.

    Raises:
        WeightsError: the model normalises queries and keys, which released models do not.
    """
    if config.qk_norm:
        raise WeightsError(
            f"{config.name} has qk_norm, which code for released models ignores; use its own model.safetensors"
        )
    backbone = {name: tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    ratio = attention_scale(config) * config.head_dim**0.5
    if not math.isclose(ratio, 1):
        for name, tensor in backbone.items():
            if name.endswith("attn.qkv.weight"):
                query, key_value = tensor.tensor_split([config.width])
                backbone[name] = torch.cat([query * ratio, key_value])
    return backbone


def check_tensors(state: Mapping[str, Tensor], wanted: Shapes, where: Path) -> None:
    """Raise WeightsError unless names and shapes are exactly the wanted ones and all values are finite."""
    check_shapes(state, wanted, where)
    for name, tensor in state.items():
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise WeightsError(f"{where}: {name} has values that are not finite; use weights from before they diverged")


def check_shapes(state: Mapping[str, Tensor], wanted: Shapes, where: Path) -> None:
    """Raise WeightsError unless names and shapes are exactly the wanted ones; values are not read."""
    if missing := wanted.keys() - state.keys():
        raise WeightsError(f"{where} lacks {some(sorted(missing))}; give a complete file of this model")
    if extra := state.keys() - wanted.keys():
        raise WeightsError(f"{where} holds {some(sorted(extra))}, which this model does not have")
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise WeightsError(
                f"{where}: {name} has the shape {tuple(tensor.shape)} and this model needs {wanted[name]}; choose the "
                "size that the file was saved from"
            )


def _shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
