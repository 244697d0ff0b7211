"""`aimscale probe RUN_DIR`: frozen-feature accuracies of a run's budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.config import ProbeSection, parse

app = typer.Typer(help="Probe the frozen features of one run's budgets.")


@app.command()
def probe(
    run_dir: Annotated[Path, typer.Argument(help="Run directory with saved budgets.", show_default=False)],
    images_seen: Annotated[
        int | None, typer.Option(help="Probe this budget only; all saved ones otherwise.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task of the run's configuration (repeatable); all otherwise.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="Labelled data set of a task of your own: its training split.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="And its test split.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="linear, attentive, knn or lora (repeatable), for --train.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache_gb: Annotated[
        float, typer.Option(help="Memory for cached features; beyond it every epoch runs the backbone again.")
    ] = 2.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat tasks that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """Train the task's probe heads on frozen features and score the chosen ones on the test split.

    Runs by itself, under torchrun or in a Slurm job step with several tasks; a killed probe goes on where it was.
    """
    from harness.probe_features import ProbeError
    from harness.probe_run import join_ranks, probe_run, wanted_tasks
    from harness.rundir import RunDir

    sections: list[ProbeSection]
    if (train is None) != (test is None):
        raise ProbeError("--train and --test belong together; give both")
    if train is None:
        if kind:
            raise ProbeError("--kind goes with --train and --test; the run's own tasks name their kinds")
        sections = wanted_tasks(RunDir(run_dir).load_config(), task)
    else:
        if task is None or len(task) != 1:
            raise ProbeError("name the task of --train and --test with one --task NAME")
        values: dict[str, Any] = {"task": task[0], "train": train, "test": test}
        sections = [parse(ProbeSection, values | ({"kinds": kind} if kind else {}), "the command line")]
    found = []
    group = join_ranks(device)
    for budget, entries in probe_run(run_dir, images_seen, sections, group=group, cache_gb=cache_gb, again=again):
        found += [{"images_seen": budget, **entry} for entry in entries]
        if group.is_first and not as_json:
            for entry in entries:
                typer.echo(_line(budget, entry))
    if group.is_first and as_json:
        typer.echo(json.dumps(found, indent=1))


def _line(budget: int, entry: dict[str, Any]) -> str:
    low, high = 100 * entry["top1_lo95"], 100 * entry["top1_hi95"]
    blocks = entry["blocks"]
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    return (
        f"{budget:>12,} images  {entry['task']:<16} {entry['kind']:<10} top-1 {100 * entry['top1']:.1f} % "
        f"(95 %: {low:.1f} to {high:.1f}, n {entry['n']}, chance {100 * entry['chance']:.1f}), {span}"
    )
