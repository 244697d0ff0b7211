"""Small pictures, their files, whole and damaged, and tars of files."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin


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


def of_every_format(rng: np.random.Generator, side: int = 40) -> dict[str, bytes]:
    """Save pictures in the ways in which the accepted formats are written."""
    colour = smooth(rng, side, side + 3)
    grey, palette, clear = colour.convert("L"), colour.convert("P"), colour.convert("RGBA")
    clear.putalpha(grey)
    frames = {"save_all": True, "append_images": [smooth(rng, side, side + 3) for _ in range(2)]}
    return {
        "png": saved(colour),
        "png grey": saved(grey),
        "png palette": saved(palette),
        "png clear": saved(clear),
        "png text": saved(colour, pnginfo=_text()),
        "jpeg": saved(colour, "jpeg"),
        "jpeg progressive": saved(colour, "jpeg", progressive=True),
        "jpeg grey": saved(grey, "jpeg"),
        "jpeg cmyk": saved(colour.convert("CMYK"), "jpeg"),
        "webp": saved(colour, "webp"),
        "webp lossless": saved(clear, "webp", lossless=True),
        "webp moving": saved(colour, "webp", **frames),
        "gif": saved(colour, "gif"),
        "gif moving": saved(colour, "gif", **frames),
        "bmp": saved(colour, "bmp"),
        "bmp palette": saved(palette, "bmp"),
        "ppm": saved(colour, "ppm"),
        "tiff": saved(colour, "tiff"),
        "tiff deflated": saved(colour, "tiff", compression="tiff_adobe_deflate"),
    }


def _text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a caption" * 20, zip=True)
    return text


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a file in one of the ways in which files break, or as one who means harm would."""
    kind, at = int(rng.integers(9)), int(rng.integers(len(data)))
    changed = bytearray(data)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = int(rng.integers(256))
    elif kind == 2:
        changed[at : at + 16] = rng.bytes(len(changed[at : at + 16]))
    elif kind == 3:
        del changed[at:]
    elif kind == 4:
        del changed[at : at + int(rng.integers(1, 64))]
    elif kind == 5:
        changed[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 6:  # a sector that was never written
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    elif kind == 7:  # extreme numbers in the header
        at %= 64
        changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
    else:
        for place in rng.integers(0, len(data), 10):
            changed[place] ^= int(rng.integers(1, 256))
    return _with_checksums(bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def _with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, so that the decoder gets to see what they hold; others stay."""
    changed, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        changed[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(changed)
