"""What a weight file holds, what it must hold, and how one is written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimscale.aim.config import ModelConfig
from aimscale.aim.weights import (
    BACKBONE,
    WeightsError,
    forget_pages,
    identify,
    known_heads,
    read_weights,
    released_shapes,
)
from aimscale.harness.run.files import written_aside

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 * 2**20


def stream_safetensors(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, forget: bool = False
) -> None:
    """Write a safetensors file one tensor at a time, aside first, then renamed.

    Args:
        state: CPU tensors, which may be mapped from a file.
        path: ends in `.safetensors`.
        metadata: text kept in the header.
        forget: the tensors are mapped and not used afterwards: let their pages go once written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _CHUNK_BYTES):
                file.write(flat[start : start + _CHUNK_BYTES].numpy().data)
            if forget:
                forget_pages(tensor)


def describe_weights(path: Path) -> dict[str, Any]:
    """What a weight file holds, from names and shapes alone.

    Raises:
        WeightsError: an unreadable file, or one that is no AIM.
    """
    state = read_weights(path)
    parts = {"preprocessor": 0, "trunk": 0, "pixel_head": 0, "head": 0}
    for name, tensor in state.items():
        part = name.split(".", 1)[0]
        parts[part] = parts.get(part, 0) + tensor.numel()
    facts: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "num_tensors": len(state),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "params": {part: count for part, count in parts.items() if count},
    }
    if "head.linear.weight" in state:
        facts["num_classes"] = len(state["head.linear.weight"])
    if parts["trunk"]:
        depth = len({name.split(".")[2] for name in state if name.startswith("trunk.blocks.")})
        patch_embedding = next((tensor for name, tensor in state.items() if name.endswith("patchifier.proj.bias")), ())
        heads = known_heads(path, len(patch_embedding), depth)
        config = identify(path, num_heads=heads or 1)
        wanted = released_shapes(config)
        backbone = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(BACKBONE)}
        facts |= {
            "size": config.name.removesuffix("-h1"),
            "width": config.width,
            "depth": config.depth,
            "num_heads": heads or "not told by the file",
            "patch_size": config.patch_size,
            "is_complete_backbone": backbone == wanted,
        }
    return facts


def check_shapes(
    state: Mapping[str, Tensor], config: ModelConfig, source: Path, wanted: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Names and shapes must be exactly the released ones."""
    wanted = released_shapes(config) if wanted is None else wanted
    if missing := sorted(wanted.keys() - state.keys()):
        raise WeightsError(f"{source} lacks {missing[0]} and so is not a whole {config.name}; download it again")
    if extra := sorted(state.keys() - wanted.keys()):
        raise WeightsError(f"{source} holds {extra[0]}, which {config.name} does not have; choose another --size")
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise WeightsError(
                f"{source}: {name} has the shape {tuple(tensor.shape)}, {config.name} needs {wanted[name]}; "
                "choose another --size"
            )
