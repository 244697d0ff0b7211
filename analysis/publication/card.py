"""Cards of a published folder and its models as the Hugging Face hub has them."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
import pandas as pd
import yaml

from aimscale.analysis.display import human
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.study import Study
from aimscale.analysis.report.summary import findings, verdict
from aimscale.analysis.table.select import probe_frame

_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Ids that name a folder of a published one, and nothing outside of it."""


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        "tags": ["scaling-laws", *["autoregressive-image-models"] * study.is_ours, "aimscale"],
        "configs": [
            {"config_name": Path(each).stem, "data_files": each, **({} if i else {"default": True})}
            for i, each in enumerate(tables)
        ],
    }
    return _template("folder.md").render(
        head=markupsafe.Markup(yaml.safe_dump(head, sort_keys=False, allow_unicode=True)),
        about=about,
        study=study,
        findings=findings(study),
        verdict=verdict(study),
        figures=sorted(path.name for path in (folder / "figures").glob("*.png"))[:4],
        cost=energy(study.frame, about),
        files={"SHA256SUMS", *(path.name for path in folder.iterdir())},  # checksums are written last
    )


def _template(name: str) -> jinja2.Template:
    """Load the template of a card."""
    loader = jinja2.PackageLoader("aimscale.analysis.publication")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["human"] = human
    environment.finalize = _one_line
    return environment.get_template(name)


def _one_line(value: Any) -> Any:
    """Write a text of a table as one line of Markdown, without HTML, links and cells of its own."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    text = html.escape(" ".join(value.split()), quote=False)
    return text.replace("|", r"\|").replace("](", r"]\(")


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
    """Write a card per run that has rows: what it is, what it saw, what was measured at each budget."""
    if "run_id" not in frame:
        return {}
    template, cards, probes = _template("model.md"), dict[str, str](), probe_frame(frame).frame
    probes = probes.assign(probe=probes["task"].astype(str) + " " + probes["kind"].astype(str))
    for run_id, rows in frame.dropna(subset=["run_id"]).groupby("run_id", sort=False):
        if not _RUN_ID.fullmatch(str(run_id)):
            raise AnalysisError(f"run_id {str(run_id)!r:.80} is no name of a folder; use letters, digits, . _ and -")
        of_run = probes[probes["run_id"] == run_id]
        wide = of_run.pivot_table(index="images_seen", columns="probe", values="top1", sort=False)
        measured = rows.sort_values("images_seen")[["images_seen", "val_loss"]].join(wide, on="images_seen")
        cards[str(run_id)] = template.render(
            licence=about.licence,
            run_id=run_id,
            run=rows.iloc[0].dropna().to_dict(),
            probes=[*wide],
            rows=measured.to_dict("records"),
        )
    return cards
