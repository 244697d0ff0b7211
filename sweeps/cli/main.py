"""The `aimscale` command: a table of verbs, whose modules are imported only when used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from aimscale.aim.errors import UserError, check_training_installed, did_you_mean, log_to_console, printable
from aimscale.analysis.display import in_command
from aimscale.sweeps.planning import DEFAULT_ROOT

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "demo": ("aimscale.sweeps.cli.demo", "Train tiny models on bundled photographs and write a report."),
        "data": ("aimscale.harness.cli.data", "Make indexed shards from images, and describe them."),
        "init": ("aimscale.sweeps.cli.init", "Write a sweep file for your data and hours."),
        "plan": (
            "aimscale.sweeps.cli.plan:plan",
            "List the runs of a sweep, their cost, and mistakes that would stop them.",
        ),
    },
    "Run": {
        "launch": ("aimscale.sweeps.cli.launch:launch", "Start, resume or skip each run of a sweep, here or on Slurm."),
        "cancel": ("aimscale.sweeps.cli.launch:cancel", "Stop the runs of a sweep; each saves first."),
        "probe": ("aimscale.harness.cli.probe:probe", "Probe frozen features of one run."),
        "baseline": ("aimscale.harness.cli.probe:baseline", "Probe a timm model, random weights or raw pixels."),
    },
    "Look": {
        "status": (
            "aimscale.sweeps.cli.sweep:status",
            "Print states, time left, and what failed and why; --wait for the end.",
        ),
        "logs": ("aimscale.sweeps.cli.sweep:logs", "Print or follow the log of one run."),
        "collect": ("aimscale.sweeps.cli.sweep:collect", "Write the results of all runs to one table."),
    },
    "Analyse": {
        "fit": ("aimscale.analysis.cli.laws:fit", "Fit a scaling law to a table, with intervals and a held-out test."),
        "forecast": ("aimscale.analysis.cli.laws:forecast", "Forecast loss and accuracies, and register the forecast."),
        "next": ("aimscale.sweeps.cli.next", "Choose the runs that narrow a forecast most for their cost."),
        "frontier": ("aimscale.analysis.cli.laws:frontier", "Find the compute-optimal size and amount of data."),
        "rates": (
            "aimscale.analysis.cli.effects:rates",
            "Find the best learning rate and batch size by model size and data.",
        ),
        "correlate": (
            "aimscale.analysis.cli.effects:correlate",
            "Correlate loss with accuracy, at equal compute and over all runs.",
        ),
        "contrast": ("aimscale.analysis.cli.effects:contrast", "Compare the levels of one column, all else equal."),
        "compare": ("aimscale.analysis.cli.report:compare", "Compare runs with published models and baselines."),
        "report": ("aimscale.analysis.cli.report:report", "Write one self-contained HTML page from a table."),
    },
    "Publish": {
        "publish": ("aimscale.sweeps.cli.publish", "Write one folder that others can cite and recompute."),
        "verify": ("aimscale.analysis.cli.report:verify", "Make a published folder again from its tables and compare."),
    },
    "Machine": {
        "doctor": ("aimscale.sweeps.doctor", "Check this machine, and say how to fix what does not work."),
        "bench": ("aimscale.harness.cli.bench", "Measure training and loading, or a whole GPU."),
        "weights": ("aimscale.harness.cli.runs", "Import and export official AIM weights."),
    },
}
"""Group -> verb -> (module, help line). The module holds a typer app `app`, a function `command`, or a function named
after a colon."""
VERBS = {name: where for group in GROUPS.values() for name, where in group.items()}
EXAMPLES = (
    ("aimscale demo", "train tiny models and write a report"),
    ("aimscale launch mysweep.yaml", "train a sweep, here or on Slurm"),
    ("aimscale fit losses.csv --columns N=params,D=images,L=loss", "fit a law to any table"),
)
HIDDEN = {name: f"aimscale.harness.cli.runs:{name}" for name in ("train", "evaluate")}
"""Verbs that launches call and that --help does not list."""


def load_verb(name: str) -> typer.Typer:
    """Import a verb's module and return its typer app."""
    place, _, function = (HIDDEN.get(name) or VERBS[name][0]).partition(":")
    module = importlib.import_module(place)
    if not function and hasattr(module, "app"):
        return module.app
    app = typer.Typer(add_completion=False)
    app.command()(getattr(module, function or "command"))
    return app


def _remember_root(ctx: typer.Context, root: Path) -> None:
    ctx.meta["root"] = root


RootOfNames = Annotated[
    Path,
    typer.Option(
        metavar="<path>",
        help="Folder that holds the sweep directories, for a sweep's name or file.",
        rich_help_panel="Table",
        callback=_remember_root,
        is_eager=True,
    ),
]


def _with_root(root: RootOfNames = DEFAULT_ROOT) -> None:
    """Hold the option `--root`, which analysis verbs get for `_find_table`."""


def _find_table(ctx: Any, param: Any, given: Any) -> Any:
    """Replace a sweep's name, file or folder among the arguments of an analysis verb by its table, collected anew."""
    if isinstance(given, list | tuple):
        return [_find_table(ctx, param, each) for each in given]
    if (path := Path(given)).suffix not in (".yaml", ".yml") and path.is_file():
        return path  # a table: sweeps are not asked for, which would take half of the start
    from aimscale.sweeps.cli.options import find_sweep, fresh_table, name_anywhere
    from aimscale.sweeps.planning.sweepfile import SweepError

    try:
        sweep = find_sweep(given, ctx.meta["root"])
    except SweepError:
        sweep = None  # the reader of tables says what is wrong
    return path if sweep is None else fresh_table(sweep, name_anywhere(sweep, given, ctx.meta["root"]))


class LazyGroup(typer.core.TyperGroup):
    """Group of verbs that imports a verb's module only to run it or to print its help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order in which they are used."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the verb's module and turn its typer app into a command."""
        if cmd_name not in VERBS and cmd_name not in HIDDEN:
            raise UserError(f"there is no verb '{cmd_name}'; {did_you_mean(cmd_name, VERBS, 'the verbs are')}")
        command = typer.main.get_command(load_verb(cmd_name))
        command.name = cmd_name
        if tables := [param for param in command.params if param.name in ("table", "tables")]:
            tables[0].callback = _find_table
            holder = typer.Typer(add_completion=False)
            holder.command()(_with_root)
            (root,) = [param for param in typer.main.get_command(holder).params if param.name == "root"]
            root.expose_value = False
            command.params.append(root)
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage and one line per verb, without importing the verbs or rich."""
        formatter.write_usage("aimscale", "VERB [OPTIONS] [ARGS]...")
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        for name, verbs in GROUPS.items():
            with formatter.section(name):
                formatter.write_dl([(verb, line) for verb, (_, line) in verbs.items()])
        with formatter.section("Examples"):
            formatter.write_dl(EXAMPLES)
        with formatter.section("Options"):
            formatter.write_dl([record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))])


app = typer.Typer(cls=LazyGroup, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aimscale {importlib.metadata.version('aimscale')}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """How do autoregressive image models scale, and how good will the next size be?"""


def _check_surroundings() -> None:
    """Open standard streams that the caller closed, and check that the working directory exists."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory was deleted; change to another one") from error


def _run(argv: list[str] | None) -> Any:
    """Run the verb."""
    _check_surroundings()
    log_to_console()
    try:
        with in_command():
            return typer.main.get_command(app)(args=argv, prog_name="aimscale")
    except ModuleNotFoundError:
        verb = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")), "this")
        check_training_installed(verb)
        raise


def main(argv: list[str] | None = None) -> Any:
    """Run the command; print user and disk errors in one sentence and exit with their code, without a traceback."""
    try:
        return _run(argv)
    except Exception as error:
        from aimscale.harness.run.failures import disk_sentence, limit_sentence

        code, sentence = getattr(error, "exit_code", None), str(error)
        if code is None and (cause := limit_sentence(error)):
            code, sentence = 2, cause
        elif isinstance(error, OSError):
            named = f"{error.filename}: {error.strerror}" if error.filename else ""
            code, sentence = 2, disk_sentence(error) or named
        if code is None or not sentence:
            raise
        # A name in a user's file may hold control characters.
        print(f"aimscale: {printable(sentence)}", file=sys.stderr)
        sys.exit(code)
