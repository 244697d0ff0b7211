"""Safetensors files written as a stream: the package's own writer needs all values in memory at once."""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a float32 safetensors file (https://huggingface.co/docs/safetensors) from a stream of values, and fsync it.

    Args:
        shapes: name -> shape, in the order of the values.
        values: values of all tensors, one after the other, on the CPU, in pieces of any size.
        metadata: text kept in the header.

    Returns:
        CRC-32 of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.float32.itemsize * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
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
