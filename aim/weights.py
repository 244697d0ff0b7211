"""Weights in and out, under the names of the released AIM models.

A released model is `preprocessor.*` and `trunk.*` (the backbone file) and `head.*` (the attentive-probe file); our own
files add `pixel_head.*`, which was never released. Reading maps the file and copies tensor by tensor, so that memory
stays near one copy of the weights; no pickled code is ever executed.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, known_sizes, model_config
from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.aim.mup import attention_scale
from aimscale.aim.probes import AttentiveProbe
from aimscale.aim.trainer_names import is_of_trainer, to_released

BACKBONE = ("preprocessor.", "trunk.")
"""Prefixes of a released backbone's names."""
NUM_HEADS = "num_heads"
"""Key, in the header of an exported safetensors file, of the number of attention heads, which shapes do not tell."""
PROBE = "head."
"""Prefix of a released attentive probe's names."""

Shapes = dict[str, tuple[int, ...]]


class WeightsError(UserError):
    """A weight file that cannot be read or does not hold what the model needs."""


def released_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of a released backbone file, from the description alone (not from our modules)."""
    d = config.width
    shapes: Shapes = {
        "preprocessor.patchifier.proj.weight": (d, config.channels, config.patch_size, config.patch_size),
        "preprocessor.patchifier.proj.bias": (d,),
        "preprocessor.patchifier.norm.weight": (d,),
        "preprocessor.patchifier.norm.bias": (d,),
    }
    for block in range(config.depth):
        shapes |= {
            f"trunk.blocks.{block}.attn.qkv.weight": (3 * d, d),
            f"trunk.blocks.{block}.attn.proj.weight": (d, d),
            f"trunk.blocks.{block}.norm_1.weight": (d,),
            f"trunk.blocks.{block}.norm_1.bias": (d,),
            f"trunk.blocks.{block}.mlp.fc1.weight": (4 * d, d),
            f"trunk.blocks.{block}.mlp.fc2.weight": (d, 4 * d),
            f"trunk.blocks.{block}.norm_2.weight": (d,),
            f"trunk.blocks.{block}.norm_2.bias": (d,),
        }
    return shapes | {"trunk.post_trunk_norm.weight": (d,), "trunk.post_trunk_norm.bias": (d,)}


def released_probe_shapes(config: ModelConfig, num_classes: int) -> Shapes:
    """Names and shapes of a released attentive-probe file."""
    d = config.width
    return {
        "head.cls_token": (1, 1, d),
        "head.k.weight": (d, d),
        "head.v.weight": (d, d),
        "head.linear.weight": (num_classes, d),
        "head.bn.running_mean": (d,),
        "head.bn.running_var": (d,),
        "head.bn.num_batches_tracked": (),
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map a `.pth` or `.safetensors` file: tensors on the CPU whose bytes are read when they are used.

    Raises:
        WeightsError: no such file, another format, or contents other than named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise WeightsError(f"{path} is neither .pth nor .safetensors; convert it to one of them")
    if not path.stat().st_size:
        raise WeightsError(f"{path} is empty; download it again")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); restore it or download it again"
        ) from error
    except Exception as error:  # torch raises many kinds, among them pickle's own, for files it will not read
        if "Cannot allocate memory" in str(error):
            size_gb = path.stat().st_size / 1e9
            raise WeightsError(f"{path} ({size_gb:.1f} GB) does not fit; use a machine with more memory") from error
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} is not a plain PyTorch state dict ({reason}); save one with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a checkpoint of the authors' trainer
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds something other than named tensors; save model.state_dict() alone")
    return state


def write_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.pth` or `.safetensors` file (the latter with text `metadata`), aside first, then renamed."""
    if path.suffix not in (".pth", ".safetensors"):
        raise WeightsError(f"{path} is neither .pth nor .safetensors; name the output file so")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in state.items()}
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(plain, aside, metadata=dict(metadata or {}))
        else:
            torch.save(plain, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def identify(path: Path, *, image_size: int = 224, num_heads: int | None = None) -> ModelConfig:
    """Which size a backbone file was saved from, by its shapes, with a linear pixel head.

    A width and depth that are no named size become `w<width>-d<depth>`. Positions are computed, not stored, so the file
    does not tell `image_size`; nor do shapes tell the number of attention heads, which is known of the published sizes,
    and of files that this project exported, and must be given for all others.

    Raises:
        WeightsError: an unreadable file, one without a patch embedding or blocks, or an unknown number of heads.
        ModelConfigError: shapes that no AIM has.
    """
    state = read_weights(path)
    if is_of_trainer(state):
        state = to_released(state)
    patch_embedding = state.get("preprocessor.patchifier.proj.weight")
    depth = len({name.split(".")[2] for name in state if name.startswith("trunk.blocks.")})
    if patch_embedding is None or patch_embedding.ndim != 4 or depth == 0:
        raise WeightsError(f"{path} is not an AIM backbone: it has no patch embedding or no trunk blocks")
    width, channels, patch_size, _ = patch_embedding.shape
    heads = num_heads or known_heads(path, width, depth)
    if heads is None:
        raise WeightsError(
            f"{path} (width {width}, {depth} blocks) is no published size and does not tell its number of attention "
            "heads; say --num-heads"
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
    """Attention heads of a published size, or as the header of a file says that this project exported; else None."""
    for published_width, published_depth, heads in RELEASED_SIZES.values():
        if (published_width, published_depth) == (width, depth):
            return heads
    if path.suffix != ".safetensors":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(NUM_HEADS, "")
    return int(recorded) if recorded.isdigit() else None


def load_model(
    path: Path, config: ModelConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> AIM:
    """Build an AIM from a file of our own, which holds every weight, pixel head included.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    model = _on_meta(config)
    _fill(model, read_weights(path), str(path), device, dtype)
    model.fill_constants()
    return model


def load_backbone(path: Path, config: ModelConfig, *, device: str | torch.device = "cpu") -> AIM:
    """Build an AIM from a released backbone file; the pixel head, which it lacks, keeps `init_weights(0)`.

    Probe tensors `head.*` in the same file are left alone, see `load_probe`.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith(PROBE)}
    model = _on_meta(config)
    model.pixel_head.to_empty(device=device)
    model.init_weights(0)
    for part in ("preprocessor", "trunk"):
        own = {name.removeprefix(f"{part}."): state.pop(name) for name in list(state) if name.startswith(f"{part}.")}
        _fill(getattr(model, part), own, str(path), device, torch.float32, prefix=f"{part}.")
    if state:
        raise WeightsError(f"{path} holds {_some(state)}, which an AIM backbone does not have")
    model.fill_constants()
    return model


def load_probe(path: Path, config: ModelConfig) -> AttentiveProbe:
    """Build the attentive probe of a released probe file; backbone tensors in the same file are left alone.

    Raises:
        WeightsError: an unreadable file; a missing, unknown or mis-shaped tensor.
    """
    state = read_weights(path)
    own = {name.removeprefix(PROBE): tensor for name, tensor in state.items() if not name.startswith(BACKBONE)}
    if "linear.weight" not in own:
        raise WeightsError(f"{path} holds no {PROBE}linear.weight; give the file of the attentive probe")
    with torch.device("meta"):
        probe = AttentiveProbe(
            config.width, config.num_heads, num_classes=own["linear.weight"].shape[0], bias="linear.bias" in own
        )
    _fill(probe, own, str(path), "cpu", torch.float32, prefix=PROBE)
    return probe


def backbone_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The part of one of our states that a released backbone file holds. Nothing is copied.

    Only a muP model whose attention is not scaled by 1 / sqrt(head dim), as released models are, gets new queries, into
    which the ratio of the two scales is multiplied.
    """
    backbone = {name: tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    ratio = attention_scale(config) * config.head_dim**0.5
    if not math.isclose(ratio, 1):
        for name, tensor in backbone.items():
            if name.endswith("attn.qkv.weight"):
                query, key_value = tensor.tensor_split([config.width])
                backbone[name] = torch.cat([query * ratio, key_value])
    return backbone


def _on_meta(config: ModelConfig) -> AIM:
    with torch.device("meta"):
        return AIM(config)


def _fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    device: str | torch.device,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    """Give a meta `module` the values of `state`, one tensor at a time; names and shapes must agree exactly."""
    wanted = module.state_dict()
    if missing := wanted.keys() - state.keys():
        raise WeightsError(f"{where} lacks {_some(missing, prefix)}; is it a file of this model?")
    if extra := state.keys() - wanted.keys():
        raise WeightsError(f"{where} holds {_some(extra, prefix)}, which this model does not have")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise WeightsError(
                f"{where}: {prefix}{name} has the shape {tuple(tensor.shape)} and this model needs "
                f"{tuple(wanted[name].shape)}; choose the size that the file was saved from"
            )
    for name, tensor in state.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        value = torch.empty(tensor.shape, device=device, dtype=kind).copy_(tensor)
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value))
        else:
            setattr(owner, leaf, value)
        forget_pages(tensor)
    for submodule in module.modules():  # constants, which no file holds; `fill_constants` computes them
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.is_meta:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                submodule._buffers[name] = torch.empty(buffer.shape, device=device, dtype=kind)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own; torch.save writes whole storages, such as a mapped file's."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _some(names: Mapping[str, Tensor] | set[str], prefix: str = "") -> str:
    """The first of some names, and how many more there are."""
    first, *more = sorted(names)
    return f"{prefix}{first}" + (f" and {len(more)} more" if more else "")


def forget_pages(tensor: Tensor) -> None:
    """Tell the kernel that a mapped tensor is not needed again, so that its pages stop counting as our memory.

    They would be read from the file again if it were; but never call this on memory that is not a mapped file.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if stop > start:
        dont_need = 4
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), dont_need)
