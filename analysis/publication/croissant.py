"""Description of a published folder for machines: Croissant 1.0 (https://docs.mlcommons.org/croissant), JSON-LD."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from aimscale.analysis.publication.card import About
from aimscale.analysis.table.schema import described

CONTEXT = json.loads(Path(__file__).with_name("croissant-context.json").read_text("utf-8"))
"""The context that Croissant 1.0 prescribes."""
TYPES = {"i": "sc:Integer", "f": "sc:Float", "b": "sc:Boolean"}
"""Kinds of numpy's types -> types of Croissant; all else is text."""
ENCODINGS = {".csv": "text/csv", ".parquet": "application/x-parquet"}
"""Suffix of a table -> its media type."""


def croissant(folder: Path, about: About) -> dict[str, Any]:
    """Describe the tables of a folder: files with checksums, and columns with type and meaning."""
    tables = [path for path in sorted((folder / "data").iterdir()) if path.suffix in ENCODINGS]
    files = [
        {
            "@type": "cr:FileObject",
            "@id": path.name,
            "name": path.name,
            "contentUrl": str(path.relative_to(folder)),
            "encodingFormat": ENCODINGS[path.suffix],
            "sha256": sha256(path),
        }
        for path in tables
    ]
    found: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "".join(c if c.isalnum() else "-" for c in about.title).strip("-"),
        "description": f"{about.title}: a row per training run and data budget.",
        "license": about.licence,
        "distribution": files,
        "recordSet": [_records(path) for path in tables],
    }
    if about.url:
        found["url"] = about.url
    if about.authors:
        found["creator"] = [{"@type": "sc:Organization", "name": name} for name in about.authors]
    return found


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(path: Path) -> dict[str, Any]:
    """Describe the columns of a table, but for those of lists, such as `probes`, which Croissant 1.0 cannot name."""
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, low_memory=False)
    frame, fields = frame.dropna(axis="columns", how="all"), []
    for name, values in frame.items():
        if values.map(pd.api.types.is_list_like).any():
            continue
        column = described(str(name))
        field = {
            "@type": "cr:Field",
            "@id": f"{path.stem}/{name}",
            "name": name,
            "dataType": TYPES.get(values.dtype.kind, "sc:Text"),
            "source": {"fileObject": {"@id": path.name}, "extract": {"column": name}},
        }
        if column.meaning:
            field["description"] = column.meaning + (f" ({column.unit})" if column.unit else "")
        fields.append(field)
    return {"@type": "cr:RecordSet", "@id": path.stem, "name": path.stem, "field": fields}
