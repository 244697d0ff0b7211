"""`aimscale train` and `aimscale weights`: one run by hand, and official AIM weights in and out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Import and export official AIM weights.", no_args_is_help=True, add_completion=False)


def train(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|CONFIG.yaml", help="A run directory, or a configuration to start from.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run directory to make from CONFIG.yaml; default: the run's id.")
    ] = None,
) -> None:
    """Train one run to its last budget, from wherever it stands; `aimscale evaluate` measures it.

    Started alone, by torchrun, or by srun. Exit codes: 0 finished, 2 a mistake in the input, 3 diverged, 75 stopped by
    Ctrl-C, SIGTERM, SIGUSR2 or a closed terminal, and saved (start it again to go on).
    """
    from aimscale.harness.data.store.dataset_info import with_fingerprints
    from aimscale.harness.distributed.group import find_placement
    from aimscale.harness.run.config import ConfigError, load_run_config
    from aimscale.harness.run.directory import EXIT_FINISHED, RunDir

    config = None
    if run.is_dir() and out is not None:
        raise ConfigError(f"{run} is a run directory already; leave --out away")
    if run.is_dir():
        directory = run
    else:
        config = with_fingerprints(load_run_config(run))
        directory = out or Path(config.run_id)
        if find_placement().rank == 0:
            RunDir.create(directory, config)
    from aimscale.harness.train.run import train as train_run

    exit_code = train_run(directory, config)
    if exit_code == EXIT_FINISHED and find_placement().rank == 0:
        typer.echo(f"next: aimscale evaluate {shlex.quote(str(directory))}")
    raise typer.Exit(exit_code)


def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.", show_default=False)],
) -> None:
    """Measure validation loss and probes of saved budgets, while the training goes on or later.

    Started alone, by torchrun, or by srun; what is done already is not done again. Exit codes as of `aimscale train`.
    """
    from aimscale.harness.evaluate.run import evaluate as evaluate_runs

    raise typer.Exit(evaluate_runs(runs))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Released file, or folder from the hub.", show_default=False)],
    run_dir: Annotated[Path, typer.Argument(help="New run directory.", show_default=False)],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of its input images, pixels; default: config.json's, or 224.")
    ] = None,
    images_seen: Annotated[
        int | None, typer.Option(min=1, help="Images it was trained on; default: the published number.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads; default: config.json's, or those of a published size.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="File of the released attentive probe; default: the one in FILE.")
    ] = None,
    head_blocks: Annotated[
        str | None,
        typer.Option(
            help="Blocks that the probe reads: last (six), best (published) or 14-19; default: config.json's."
        ),
    ] = None,
) -> None:
    """Turn released weights into a finished run, which `probe` and `collect` read like any other."""
    from aimscale.harness.weights import import_weights

    run = import_weights(
        file,
        run_dir,
        image_size=image_size,
        images_seen=images_seen,
        num_heads=num_heads,
        head=head,
        head_blocks=head_blocks,
    )
    config = run.load_config()
    typer.echo(
        f"wrote {run.path}: {config.training.model.size}, {config.evaluation.budgets[0]:,} images\n"
        f"to probe it on tasks of a file: aimscale probe {shlex.quote(str(run.path))} --tasks TASKS.yaml"
    )


@app.command("export")
def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory with saved budgets.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    images_seen: Annotated[int | None, typer.Option(help="Budget; default: the last.", show_default=False)] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="Task, or TASK-EVALUATION, whose attentive probe is the head; default: an imported run's own head.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a budget's backbone and a head as the hub has AIM: model.safetensors and config.json."""
    from aimscale.harness.results import probe_head
    from aimscale.harness.run.directory import RunDir
    from aimscale.harness.run.schedule import chosen_budgets
    from aimscale.harness.weights import export_weights

    run = RunDir(run_dir)
    run.load_config()
    budget = chosen_budgets(run, images_seen)[-1]
    probe_file = None if probe is None else probe_head(run, budget, probe)
    for path in export_weights(run, budget, out, probe_file=probe_file):
        typer.echo(f"wrote {path} ({path.stat().st_size:,} bytes)")
