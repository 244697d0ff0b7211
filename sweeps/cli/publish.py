"""`aimscale publish SWEEP OUT`: one folder that others can cite, recompute and put on a hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from aimscale.aim.errors import check_training_installed
from aimscale.analysis.cli import options
from aimscale.harness.run.program import load_program
from aimscale.sweeps.cli.options import Root
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.state.record import RunRecord


def command(
    sweep_or_tables: Annotated[list[str], typer.Argument(help="A sweep, or tables of one page.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    licence: Annotated[str, typer.Option(help="Licence of the folder, such as CC-BY-4.0.")],
    title: Annotated[str | None, typer.Option(help="Title; default: the sweep's description or name.")] = None,
    images: Annotated[str | None, typer.Option(help="Data set that was trained on, and its licence.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="Who publishes it. May be repeated.")] = None,
    watts: Annotated[float | None, typer.Option(min=0, help="Mean power of a device while training, W.")] = None,
    co2: Annotated[float | None, typer.Option(min=0, help="Carbon intensity of the electricity, g CO2/kWh.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Export the weights of every finished run, too.")] = False,
    columns: options.Columns = None,
    where: options.Where = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write one folder with table, page, figures, LaTeX, numbers and checksums, in the layout of the Hugging Face hub.

    `aimscale verify OUT` makes all that follows from the tables again, on any machine and without torch.
    """
    from aimscale.analysis.publication.card import About
    from aimscale.analysis.publication.folder import publish
    from aimscale.analysis.table.columns import parse_columns
    from aimscale.sweeps.cli.options import find_sweep, fresh_table

    sweeps = [find_sweep(each, root) for each in sweep_or_tables]
    sweep = next(filter(None, sweeps), None)
    if sweep is not None and len(sweeps) > 1:
        raise SweepError(f"{sweep.name} is a sweep; publish one sweep, or tables")
    if weights and sweep is None:
        raise SweepError("--weights exports the runs of a sweep; tables have none")
    if weights and sweep is not None and sweep.file.trainer:
        raise SweepError("--weights exports models of aimscale's own trainer; publish those of your program yourself")
    if not licence.strip():
        raise SweepError("--licence is empty; name the licence of the folder, such as CC-BY-4.0")
    if co2 is not None and watts is None:
        raise SweepError("--co2 needs --watts, the mean power of a device")
    tables = [fresh_table(sweep, sweep.name)] if sweep else [Path(each) for each in sweep_or_tables]
    about = About(
        title=title or (sweep.file.description or sweep.name if sweep else tables[0].stem),
        licence=licence,
        images=images,
        authors=tuple(author or ()),
        watts=watts,
        g_co2_per_kwh=co2,
    )
    publish(
        tables,
        out,
        about,
        columns=parse_columns(columns or []),
        where=where or [],
        add=lambda folder: _add_sweep(sweep, folder, weights=weights) if sweep else None,
    )
    typer.echo(f"wrote {out}")
    options.say_next(f"aimscale verify {shlex.quote(str(out))}")


def _add_sweep(sweep: Sweep, folder: Path, *, weights: bool) -> None:
    """Add what a sweep has beside its tables: its file, versions, configurations, weights."""
    (folder / "sweep.yaml").write_text(_without_credentials(sweep.text), encoding="utf-8")
    versions: dict[str, set[str]] = {}
    for run in map(RunRecord, sorted(sweep.runs_dir.glob("*/"))):
        if not (model := folder / "models" / run.name).is_dir():
            continue  # of another plan
        config = load_program(run.config) if sweep.file.trainer else run.load_config()
        if config.run_id != run.name:
            raise SweepError(f"{run.config} is damaged: it is of another run; delete it, and launch to write it again")
        text = _without_credentials(run.config.read_text("utf-8"))
        if sweep.file.trainer:  # its commands hold whole paths
            text = text.replace(str(sweep.runs_dir), "runs").replace(str(sweep.base_dir), ".")
        (model / "config.yaml").write_text(text, encoding="utf-8")
        for start in run.read_starts():
            for package, version in start.get("packages", {}).items():
                versions.setdefault(package, set()).add(version)
        if weights:
            _export_weights(run, model)
    lines = [f"{package}=={' or '.join(sorted(numbers))}\n" for package, numbers in sorted(versions.items())]
    (folder / "environment.txt").write_text("".join(lines), encoding="utf-8")


def _without_credentials(text: str) -> str:
    """Remove user and password from the URLs of a text: `https://user:token@host` becomes `https://host`."""
    return re.sub(r"(\w://)[^\s/@\"']*@", r"\1", text)


def _export_weights(run: RunRecord, model: Path) -> None:
    """Write the weights of a run's last budget in the hub's layout, beside its card."""
    check_training_installed("publish --weights")
    from aimscale.harness.run.schedule import chosen_budgets
    from aimscale.harness.weights import export_weights

    export_weights(run, chosen_budgets(run, None)[-1], model / "weights", probe_file=None)
