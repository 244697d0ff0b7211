"""`aimscale bench`: throughput against named limits."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from aimscale.harness.bench.train import TrainBench

app = typer.Typer(
    help="Measure throughput, MFU, loader and fit speed against named limits.",
    no_args_is_help=True,
    add_completion=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is a card.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads (CPU).")]


def _count(value: str | int) -> int:
    from aimscale.harness.run.counts import count

    number = count(value)
    if not isinstance(number, int) or number < 1:
        raise typer.BadParameter(f"'{value}' is no count; give one such as 4096, 4k or 500M")
    return number


def _counted(text: str) -> Any:
    return typer.Option(parser=_count, metavar="COUNT", help=text)


@app.command()
def train(
    size: Annotated[str, typer.Option(help="Model size: a name, or w<width>-d<depth>.")] = "rung-128",
    config: Annotated[
        Path | None,
        typer.Option(help="Take model, batch and data from a run's config.yaml; measures the data wait too."),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the image, pixels.")] = 32,
    patch_size: Annotated[int, typer.Option(help="Side of a patch, pixels.")] = 4,
    head_rule: Annotated[str, typer.Option(help="released, proportional or none.")] = "proportional",
    head_width: Annotated[int | None, typer.Option(help="Width of the pixel head; default: by the head rule.")] = None,
    head_depth: Annotated[int | None, typer.Option(help="Blocks of the pixel head; default: by the head rule.")] = None,
    batch: Annotated[int, typer.Option(help="Images per optimiser step.")] = 64,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    zero_stage: Annotated[int | None, typer.Option(help="ZeRO stage; default: the memory rule.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Images per pass; default: the memory rule.")] = None,
    compile_as: Annotated[
        str, typer.Option("--compile", help="`runtime.compile`: auto, true, false or graphs.")
    ] = "auto",
    device: Device = "auto",
    threads: Threads = 1,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes, with --config.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 20,
    peer: Annotated[
        bool,
        typer.Option(
            "--peer",
            help="Also time a plain PyTorch loop that trains as the paper describes: the head on every token, "
            "independent prefixes, autocast for bf16.",
        ),
    ] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Also time ZeRO stages 1 and 2.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Leave FSDP2 and the bare loop out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """ms/step, images/s, MFU, data wait, peak memory, and the ratios to PyTorch's FSDP2 and plain loops, in one run."""
    import torch

    from aimscale.aim.config import model_config
    from aimscale.harness.bench.train import run
    from aimscale.harness.run.config import OptimiserSection, RuntimeConfig, load_run_config, parse
    from aimscale.harness.run.row import model_of

    torch.set_num_threads(threads)
    batches = None
    if config is None:
        shape = model_config(
            size,
            image_size=image_size,
            patch_size=patch_size,
            head_rule=head_rule,  # type: ignore[arg-type]
            head_width=head_width,
            head_depth=head_depth,
        )
        optimiser = parse(OptimiserSection, {"batch_size": batch, "precision": precision}, "the command line")
    else:
        from aimscale.harness.data.stream.ahead import rank_batches
        from aimscale.harness.data.stream.unindexed import open_stream

        loaded = load_run_config(config)
        shape, optimiser = model_of(loaded.training), loaded.training.optimiser
        batches = functools.partial(
            rank_batches,
            open_stream(loaded, augment_on=loaded.runtime.augment_on),
            start=0,
            stop=(steps + 2) * optimiser.batch_size,
            batch_size=optimiser.batch_size,
            num_workers=workers,
        )
    runtime = {
        "zero_stage": "auto" if zero_stage is None else zero_stage,
        "micro_batch": "auto" if micro_batch is None else micro_batch,
        "compile": compile_as,
        "device": device,
    }
    measured = run(
        shape,
        optimiser,
        parse(RuntimeConfig, runtime, "the command line"),
        num_steps=steps,
        batches=batches,
        with_peer=peer,
        with_stages=stages,
        with_references=not alone,
    )
    if int(os.environ["RANK"]) > 0:
        return
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(measured)))
    else:
        _print_train(measured)


def _print_train(measured: TrainBench) -> None:
    typer.echo(
        f"{measured.size}, {measured.params:,} parameters, batch {measured.batch_size} (micro-batch "
        f"{measured.micro_batch}), {measured.precision}, ZeRO {measured.zero_stage}, {measured.device}, "
        f"{measured.world_size} rank(s) of {measured.num_threads} thread(s), compiled: {measured.compiled}"
    )
    names = {"fsdp2": "PyTorch FSDP2", "bare": "bare PyTorch loop", "peer": "loop as published"}
    others = {
        names.get(name, f"ZeRO stage {name[-1]}"): f"{it.ms_per_step:.1f} ms; ours / it = {it.ours_over_it:.3f}"
        for name, it in measured.others.items()
    }
    wait = "not measured (give --config)" if measured.data_wait is None else f"{100 * measured.data_wait:.1f} %"
    _table(
        {
            "step": f"{measured.ms_per_step:.1f} ms",
            "images/s": f"{measured.images_per_s:.0f}",
            **_utilisation(measured),
            **others,
            "data wait": wait,
            "peak memory": f"{measured.memory_bytes / 1e9:.2f} GB (est. {measured.memory_estimate_bytes / 1e9:.2f})",
            "start-up": f"{measured.startup_s:.1f} s to the end of the first step",
        }
    )


@app.command()
def checkpoint(
    size: Annotated[str, typer.Option(help="Model size: a name, or w<width>-d<depth>.")] = "rung-128",
    image_size: Annotated[int, typer.Option(help="Side of the image, pixels.")] = 32,
    patch_size: Annotated[int, typer.Option(help="Side of a patch, pixels.")] = 4,
    head_rule: Annotated[str, typer.Option(help="released, proportional or none.")] = "proportional",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    device: Device = "auto",
    folder: Annotated[Path, typer.Option(help="Folder on the disk to test.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """How long a checkpoint stops training, with the state copied aside and without; alone or under torchrun."""
    from aimscale.aim.config import model_config
    from aimscale.harness.bench.checkpoint import run

    shape = model_config(size, image_size=image_size, patch_size=patch_size, head_rule=head_rule)  # type: ignore[arg-type]
    found = run(shape, precision=precision, device=device, folder=folder)  # type: ignore[arg-type]
    if int(os.environ["RANK"]) > 0:
        return
    if as_json:
        typer.echo(json.dumps(found))
        return
    share = f"{100 * found['stall']:.1f} % of a save for which training waits ({found['wait_s']:.2f} s)"
    _table(
        {
            "size": f"{found['bytes'] / 1e9:.3f} GB, {found['world_size']} rank(s)",
            "stall": f"{found['stall_s']:.3f} s, {share}",
            "write": f"{found['write_s']:.2f} s, in which a step takes {found['slowdown']:.2f} times as long",
            "load": f"{found['load_s']:.2f} s",
        }
    )


@app.command()
def data(
    images: Annotated[int, _counted("JPEGs to cycle over.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Wall time of each of the two comparisons.")] = 10.0,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="Numbers of loader processes; default: 0, 1 and every core.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Images/s of the training stream against the fastest decode-and-crop of this machine, and the least any needs."""
    from aimscale.harness.bench.data import run, table

    result = run(num_images=images, seconds=seconds, workers=workers)
    typer.echo(json.dumps(result) if as_json else table(result))


@app.command()
def index(
    images: Annotated[int, _counted("Images of the index, which is made up and deleted, e.g. 200M.")] = 2_000_000,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that open it at once.")] = 4,
    reads: Annotated[int, _counted("Random positions that each process reads.")] = 10_000,
    folder: Annotated[Path | None, typer.Option(help="Where to make it (24 bytes per image); default: /tmp.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What an index of very many images costs: opening, memory, random reads, the overlap check."""
    from aimscale.harness.bench.index import run, table

    result = run(num_images=images, num_ranks=ranks, num_reads=reads, folder=folder)
    typer.echo(json.dumps(result) if as_json else table(result))


@app.command()
def gemm(device: Device = "auto", threads: Threads = 1, as_json: JsonOption = False) -> None:
    """Matrix-multiplication rate of this device, in fp32 and bf16: the peak of MFU."""
    import torch

    from aimscale.harness.device.distributed import choose_device, find_placement
    from aimscale.harness.device.peak import measure_peak

    torch.set_num_threads(threads)
    chosen = choose_device(find_placement(), device)  # float32 products as in training
    peaks = [measure_peak(chosen, precision) for precision in ("fp32", "bf16")]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(peak) for peak in peaks]))
        return
    for peak in peaks:
        typer.echo(f"{peak.precision}  {peak.flops_per_s / 1e9:9.0f} GFLOP/s  (n = {peak.gemm_side}, {peak.device})")


def _utilisation(measured: TrainBench) -> dict[str, str]:
    """MFU three ways, each with its name and its peak."""
    nominal, gemm = measured.nominal_flops_per_s, measured.peak_flops_per_s
    peaks = {"mfu_published": nominal, "mfu_executed": nominal, "mfu": gemm}
    names = ("MFU published/nominal", "MFU executed/nominal", "MFU executed/measured")
    rows = {}
    for name, (field, peak) in zip(names, peaks.items(), strict=True):
        share = getattr(measured, field)
        if share is not None and peak is not None:
            impossible = "; above 100 %: this peak is wrong" if share > 1 else ""
            rows[name] = f"{100 * share:.1f} % of {peak / 1e9:,.0f} GFLOP/s{impossible}"
    return rows


def _table(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"  {name:<{width}}  {value}")
