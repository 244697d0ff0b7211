"""Weights in and out, under the names of the released AIM models.

A released model is `preprocessor.*` and `trunk.*` (the backbone file) and `head.*` (the attentive-probe file); our own
files add `pixel_head.*`, which was never released. Checkpoints of the authors' trainer (ml-l3m) hold query, key and
value apart (`attn.q_proj`, ...), the pixel head as `head.decoder_*`, and fixed positions, which are computed here.
Files are mapped and copied tensor by tensor; no pickled code is ever executed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, known_sizes, model_config
from aimscale.aim.errors import UserError, some
from aimscale.aim.model import AIM
from aimscale.aim.mup import attention_scale
from aimscale.aim.probes import AttentiveProbe

BACKBONE = ("preprocessor.", "trunk.")
"""Prefixes of a released backbone's names."""
PROBE = "head."
"""Prefix of a released attentive probe's names."""
NUM_HEADS = "num_heads"
"""Key, in the header of an exported safetensors file, of the number of attention heads, which shapes do not tell."""
_MAX_DEPTH = 1000  # blocks
TRAINER_NORM_EPS = 1e-5
"""Epsilon of every LayerNorm in the authors' trainer."""

_TRAINER_HEAD = {"projection": "proj_in", "blocks": "blocks", "norm": "norm", "pred": "proj_out"}
_TRAINER_HEAD_NAME = re.compile(rf"^head\.decoder_({'|'.join(_TRAINER_HEAD)})\.")
_WRAPPER = re.compile(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_WRAPPERS_AHEAD = re.compile(r"^(module\.|_orig_mod\.|model\.)+")
"""Prefixes and inner parts that compilation and data parallelism add to parameter names."""
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

Shapes = dict[str, tuple[int, ...]]


class WeightsError(UserError):
    """Weight file that cannot be read or does not hold what the model needs."""


def model_shapes(config: ModelConfig) -> Shapes:
    """Return names and shapes of a model's state; a released backbone holds those whose names begin with `BACKBONE`."""
    with torch.device("meta"):
        return _shapes_of(AIM(config))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map a `.pth` or `.safetensors` file into memory: tensors on the CPU whose bytes are read on use.

    Raises:
        WeightsError: no such file, another format, or contents other than named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise WeightsError(f"{path} is neither .pth nor .safetensors; convert it to one of them")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); restore it or download it again"
        ) from error
    except Exception as error:  # torch raises many types, pickle's among them, for unreadable files
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} is not a plain PyTorch state dict ({reason}); save one with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a checkpoint of the authors' trainer
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise WeightsError(f"{path} holds something other than named tensors; save model.state_dict() alone")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not _is_plain(value):
            raise WeightsError(
                f"{path}: {name} is no plain tensor; save the model's state_dict() in fp32, bf16 or fp16"
            )
    return state


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor stores a value for each of its elements: a file of 1 kB may describe 1 TB that it does
    not hold."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def write_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.pth` or `.safetensors` file (the latter with text `metadata`) under a temporary name, then rename it.

    Raises:
        WeightsError: another suffix.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise WeightsError(f"{path} is neither .pth nor .safetensors; name the output file so")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            ordered = dict(sorted(state.items(), key=lambda item: -item[1].itemsize))  # so that every tensor is aligned
            layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
            write_safetensors(partial, layout, (tensor.detach().cpu() for tensor in ordered.values()), metadata)
        else:
            # torch.save writes whole storages: without the clone, a mapped file's
            torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file (https://huggingface.co/docs/safetensors) from a stream of values, and fsync it.

    The package's own writer needs all of them in memory at once, twice.

    Args:
        layout: name -> dtype and shape, in the order of the values.
        values: values of all tensors, one after the other, on the CPU, in pieces of any size.
        metadata: text kept in the header.

    Returns:
        CRC-32 of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with path.open("wb") as file:
        pieces: Iterable[Any] = (value.contiguous().view(-1).view(torch.uint8).numpy().data for value in values)
        for piece in itertools.chain([len(text).to_bytes(8, "little") + text], pieces):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
        file.flush()
        os.fsync(file.fileno())
    return crc


def identify(path: Path, *, image_size: int = 224, num_heads: int | None = None) -> ModelConfig:
    """Infer the size of a backbone file from its shapes, with a linear pixel head.

    A width and depth that are no named size become `w<width>-d<depth>`. The file does not tell `image_size`, since
    positions are computed and not stored. Nor do shapes tell the number of attention heads: it is known of published
    sizes and of files that this project exported, and must be passed for all others.

    Raises:
        WeightsError: an unreadable file, one without a patch embedding or blocks, or an unknown number of heads.
        ModelConfigError: shapes that no AIM has.
    """
    state = read_weights(path)
    if is_trainer_state(state):
        state = to_released(state)
    patch_embedding = state.get("preprocessor.patchifier.proj.weight")
    depth = len({name.split(".")[2] for name in state if name.startswith("trunk.blocks.")})
    shape = () if patch_embedding is None else patch_embedding.shape
    if len(shape) != 4 or 0 in shape or not 0 < depth <= _MAX_DEPTH:
        raise WeightsError(f"{path} is not an AIM backbone: it has no patch embedding or no blocks")
    width, channels, patch_size, _ = shape
    heads = num_heads or known_heads(path, width, depth)
    if heads is None:
        raise WeightsError(
            f"{path} (width {width}, {depth} blocks) is no published size and does not tell its number of attention "
            "heads; add --num-heads N"
        )
    known = [size for size in known_sizes() if _shape_of(size) == (width, depth, heads)]
    free = f"w{width}-d{depth}"
    return model_config(
        known[0] if known else free if _shape_of(free)[2] == heads else f"{free}-h{heads}",
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        head_rule="none",
    )


def _shape_of(size: str) -> tuple[int, int, int]:
    config = model_config(size)
    return config.width, config.depth, config.num_heads


def known_heads(path: Path, width: int, depth: int) -> int | None:
    """Return the number of attention heads of a published size, or as recorded in a file exported by this project; else
    None."""
    for published_width, published_depth, heads in RELEASED_SIZES.values():
        if (published_width, published_depth) == (width, depth):
            return heads
    if path.suffix != ".safetensors":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(NUM_HEADS, "")
    return int(recorded) if re.fullmatch("[1-9][0-9]{0,3}", recorded) else None


def load_model(path: Path, config: ModelConfig, *, device: str | torch.device = "cpu") -> AIM:
    """Build a float32 AIM from a file of our own, which holds every weight, pixel head included.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    with torch.device("meta"):
        model = AIM(config)
    _fill(model, read_weights(path), path, device)
    model.fill_constants()
    return model


def load_backbone(path: Path, config: ModelConfig, *, device: str | torch.device = "cpu") -> AIM:
    """Build a float32 AIM from a released backbone file; missing parts, such as the pixel head, come from
    `init_weights(0)`.

    Probe tensors `head.*` in the same file are left alone, see `load_probe`.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith(PROBE)}
    if others := [name for name in state if not name.startswith(BACKBONE)]:
        raise WeightsError(f"{path} holds {some(sorted(others))}, which an AIM backbone does not have")
    with torch.device("meta"):
        model = AIM(config)
    for lacking in filter(None, (model.pixel_head, model.mask)):
        lacking.to_empty(device=device)
    model.init_weights(0)
    for prefix in BACKBONE:
        _fill(model.get_submodule(prefix[:-1]), state, path, device, prefix)
    model.fill_constants()
    return model


def load_probe(path: Path, config: ModelConfig) -> AttentiveProbe:
    """Build the attentive probe of a released probe file; other tensors in the same file are left alone.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = read_weights(path)
    probe = _probe_on_meta(state, config, path)
    _fill(probe, state, path, "cpu", PROBE)
    return probe


def probe_state(state: Mapping[str, Tensor], config: ModelConfig, where: Path) -> dict[str, Tensor]:
    """Select and check the attentive probe among some tensors.

    Raises:
        WeightsError: there is none, or one that does not fit the model.
    """
    own = {name: tensor for name, tensor in state.items() if name.startswith(PROBE)}
    check_tensors(own, _shapes_of(_probe_on_meta(own, config, where), PROBE), where)
    return own


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
    """
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
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise WeightsError(f"{where}: {name} has values that are not finite; use weights from before they diverged")


def _shapes_of(module: nn.Module, prefix: str = "") -> Shapes:
    return {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _fill(
    module: nn.Module, state: Mapping[str, Tensor], where: Path, device: str | torch.device, prefix: str = ""
) -> None:
    """Give a meta `module` the values of `state` under `prefix`; constants, which no file holds, stay undefined."""
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    check_tensors(own, _shapes_of(module, prefix), where)
    module.to_empty(device=device)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in own.items()})


def is_trainer_state(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of the authors' trainer."""
    return any(name.endswith("attn.q_proj.weight") for name in state)


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the released names; q, k and v of a block are joined when all three are there.

    Names that are neither a backbone's nor a pixel head's are kept as they are, for the caller to refuse.
    """
    plain = {_WRAPPER.sub("", _WRAPPERS_AHEAD.sub("", name)): tensor for name, tensor in state.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if name.endswith("pos_embed"):
            continue
        if found := re.fullmatch(r"(trunk\.blocks\.\d+\.attn\.)([qkv])_proj\.weight", name):
            parts = [plain.get(f"{found[1]}{part}_proj.weight", tensor.new_empty(0)) for part in "qkv"]
            if found[2] == "q" and all(part.shape == tensor.shape and part.ndim == 2 for part in parts):
                out[f"{found[1]}qkv.weight"] = torch.cat(parts)
            continue
        name = re.sub(r"^preprocessor\.(?:[\w.]+\.)?patchifier\.", "preprocessor.patchifier.", name)
        name = _TRAINER_HEAD_NAME.sub(lambda found: f"pixel_head.{_TRAINER_HEAD[found[1]]}.", name)
        out[name] = tensor
    return out
