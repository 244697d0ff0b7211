"""Start of a run from weights that were trained before: `init` of its configuration, and the identity of its source.

Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from safetensors import SafetensorError, safe_open

from aimscale.aim.errors import UserError
from aimscale.harness.run.files import cache_folder, read_object, write_json
from aimscale.harness.run.section import Count, Section, count, short_hash

ABOUT = "aimscale"
"""Key in a weight file's metadata whose value, as JSON, holds what training knows of the budget."""


class InitSection(Section):
    """Weights that training starts from, in place of drawn ones."""

    weights: str | None = None
    """Weight file: safetensors, or a PyTorch state dict, under the released names. `{size}` and `{seed}` stand for the
    run's own."""
    run: str | None = None
    """Instead of a file, a run and its budget, `RUN_ID@D`: of this sweep, planned before, or `SWEEP/RUN_ID@D`. `*`,
    `{size}` and `{seed}` may stand for parts of the id."""
    parts: Literal["backbone", "all"] = "backbone"
    """`backbone`: the pixel head is drawn, as released files have none; `all`: the head is taken, too."""
    freeze_images: Annotated[int, BeforeValidator(count), Field(ge=0, le=10**15)] = 0
    """Number of images for which the backbone stays as it is, while the head learns."""
    name: str | None = None
    """Name of the source in tables, one for all sizes whose sources were trained alike; by default as written above."""
    digest: str | None = Field(None, pattern="[0-9a-f]{64}")
    """SHA-256 of the weight file; filled in when a run is planned. A run refuses another file."""
    images_seen: Count | None = None
    """D of the source; filled in where it is one of aimscale's own files."""
    flops: float | None = Field(None, gt=0)
    """FLOPs that trained the source, those of its own source included; filled in likewise."""

    @model_validator(mode="after")
    def _has_source(self) -> InitSection:
        if self.weights is None:
            raise ValueError("init needs `weights: FILE` or `run: RUN_ID@D`")
        return self

    @property
    def file(self) -> Path:
        """The weight file."""
        return Path(self.weights or "")

    @property
    def label(self) -> str:
        """Value of the column `init`."""
        name = self.name or self.run or self.file.stem
        frozen = f", frozen for {self.freeze_images}" * bool(self.freeze_images)
        return f"{name}{' with head' * (self.parts == 'all')}{frozen}"


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is remembered on this machine until its size or its time change."""
    status, kept = path.stat(), cache_folder() / "digests" / f"{short_hash(str(path.resolve()))}.json"
    identity = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    with contextlib.suppress(OSError, UserError):
        if (told := read_object(kept)) and identity.items() <= told.items():
            return str(told["sha256"])
    digest = sha256_of(path)
    with contextlib.suppress(OSError):
        write_json(kept, {**identity, "sha256": digest}, durable=False)
    return digest


def read_about(path: Path) -> dict[str, Any]:
    """Read what training knew of the weights in one of aimscale's own files; empty for any other file."""
    with contextlib.suppress(SafetensorError, OSError, ValueError, RecursionError), safe_open(path, "numpy") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
        return about if isinstance(about, dict) else {}
    return {}
