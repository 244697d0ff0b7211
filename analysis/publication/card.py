"""Cards of a published folder and its models as the Hugging Face hub has them, and its description for machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from aimscale.analysis.report.study import Study
from aimscale.analysis.report.summary import findings, verdict
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.table.schema import described
from aimscale.analysis.words import human

CONTEXT = json.loads(Path(__file__).with_name("croissant-context.json").read_text("utf-8"))
"""The context that Croissant 1.0 prescribes."""
TYPES = {"i": "sc:Integer", "f": "sc:Float", "b": "sc:Boolean"}
"""Kinds of numpy's types -> types of Croissant; all else is text."""
ENCODINGS = {".csv": "text/csv", ".parquet": "application/x-parquet"}
"""Suffix of a table -> its media type."""
FILES = {
    "data": "tables, a row per run and data budget",
    "report.html": "the page, in one file",
    "numbers.json": "every number of the page, and how the tables were read",
    "figures": "each figure as PDF; the findings' as PNG, too",
    "tables": "each table for LaTeX (booktabs)",
    "models": "configuration and card of every run; its weights where they are published",
    "sweep.yaml": "what was run",
    "environment.txt": "versions of the packages that trained",
    "croissant.json": "the tables described for machines",
    "CITATION.cff": "how to cite it",
    "SHA256SUMS": "checksums of all files, for `sha256sum -c`",
}
"""Files of a folder that the card explains where they are there."""
WRITTEN_LAST = ("SHA256SUMS",)


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


class About(NamedTuple):
    """Facts of a publication that only its authors know."""

    title: str
    licence: str
    """Licence of this folder, best as an SPDX identifier such as CC-BY-4.0."""
    images: str | None = None
    """Data set that was trained on, and its licence."""
    authors: tuple[str, ...] = ()
    url: str | None = None
    """Where it will be found."""
    watts: float | None = None
    """Mean power of a device while training, W."""
    g_co2_per_kwh: float | None = None
    """Carbon intensity of the electricity, g CO2/kWh."""


def folder_card(study: Study, tables: Sequence[str], folder: Path, about: About) -> str:
    """Write the README of a folder: YAML for the hub, findings, cost, files, how to check them."""
    head = {
        "license": about.licence.lower(),
        "pretty_name": about.title,
        "tags": ["scaling-laws", "autoregressive-image-models", "aimscale"],
        "configs": [
            {"config_name": Path(each).stem, "data_files": each, **({} if i else {"default": True})}
            for i, each in enumerate(tables)
        ],
    }
    figures = sorted(path.name for path in (folder / "figures").glob("*.png"))[:4]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {about.title}",
        f"{len(study.frame)} rows, one per training run and data budget, analysed by aimscale.",
        "## Findings",
        "\n".join([f"- **{each.title}.** {each.caption}" for each in findings(study)]),
        "\n".join(f"- **{line.question}** {line.answer}" for line in verdict(study)),
        "\n".join(f"![{name.removesuffix('.png').replace('-', ' ')}](figures/{name})" for name in figures),
    ]
    if cost := energy(study.frame, about):
        parts += ["## Cost", "\n".join(f"- {line}" for line in cost)]
    there = [(name, what) for name, what in FILES.items() if name in WRITTEN_LAST or (folder / name).exists()]
    listed = "\n".join(f"| `{name}` | {what} |" for name, what in there)
    parts += [
        f"## Files\n\n| file | content |\n|---|---|\n{listed}",
        "## Check it",
        "Any laptop recomputes every number of the page from the tables, without torch:",
        "```bash\npip install aimscale\naimscale verify .\n```",
        f"## Licence\n\nThis folder: {', '.join((about.licence, *about.authors))}.",
        f"Images that were trained on (not part of it): {about.images}." if about.images else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def energy(frame: pd.DataFrame, about: About) -> list[str]:
    """Say what training cost: a run's last budget counts all its device-hours; power and intensity are the authors'."""
    if "device_hours" not in frame or not (hours := float(frame.groupby("run_id")["device_hours"].max().sum())):
        return []
    lines = [f"{human(hours)} device-hours of training, {frame['run_id'].nunique()} runs"]
    kwh = hours * (about.watts or 0) / 1000
    if about.watts is not None:
        source = f"device-hours x {about.watts:g} W, the mean power of a device that the authors give"
        lines.append(f"{human(kwh)} kWh: {source}")
    if about.watts is not None and about.g_co2_per_kwh is not None:
        lines.append(f"{human(kwh * about.g_co2_per_kwh / 1000)} kg CO2 at {about.g_co2_per_kwh:g} g/kWh")
    return lines


def model_cards(frame: pd.DataFrame, about: About) -> dict[str, str]:
    """Write a card per run that has rows: what it is, what it saw, what was measured."""
    if "run_id" not in frame:
        return {}
    head = f"---\nlicense: {about.licence.lower()}\ntags: [aimscale, autoregressive-image-models]\n---"
    probes = probe_frame(frame) if "probes" in frame else pd.DataFrame(columns=["run_id"])
    return {
        str(run_id): "\n\n".join(
            [head, f"# {run_id}", _sentence(rows.iloc[0]), _measured(rows, probes[probes["run_id"] == run_id])]
        )
        + "\n"
        for run_id, rows in frame.dropna(subset=["run_id"]).groupby("run_id", sort=False)
    }


def _sentence(row: pd.Series) -> str:
    """Say what a run is, from the columns that its row has."""
    has = row.dropna()
    said = [f"An autoregressive image model of size {has.get('size')}"]
    said += [f"with {human(has['params_total'])} parameters"] if "params_total" in has else []
    said += [f"on {human(has['unique_images'])} different images"] if "unique_images" in has else []
    said += [f"(fingerprint {has['data_fingerprint']})"] if "data_fingerprint" in has else []
    return f"{' '.join(said)}; seed {has.get('seed')}, code {has.get('git_commit')}."


def _measured(rows: pd.DataFrame, probes: pd.DataFrame) -> str:
    """Write a table of what was measured at each budget."""
    heads, cells = ["images seen", "validation loss"], list[dict[str, str]]()
    for _, row in rows.sort_values("images_seen").iterrows():
        cell = {"images seen": human(row["images_seen"]), "validation loss": human(row["val_loss"], 4)}
        own = probes[probes["images_seen"] == row["images_seen"]] if len(probes) else probes
        cell |= {f"{each['task']} {each['kind']}, %": f"{100 * each['top1']:.1f}" for _, each in own.iterrows()}
        cells.append(cell)
        heads += [name for name in cell if name not in heads]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.get(head, '') for head in heads)} |" for cell in cells)])
