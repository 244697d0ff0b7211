"""Small pictures, their files, and tars of files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image


def smooth(rng: np.random.Generator, height: int, width: int, coarse: int = 6) -> Image.Image:
    """Make a random picture as a sum of waves."""
    few = Image.fromarray(rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
    return few.resize((width, height), Image.Resampling.BICUBIC)


def saved(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Encode a picture as a file and return its bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    """Write a tar of the files, name -> bytes."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
