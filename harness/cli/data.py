"""`aimscale data`: images to indexed shards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Images to indexed shards: pack, index, info.", no_args_is_help=True, add_completion=False)

_LISTED_BAD = 5
ClassesOption = Annotated[
    Path | None, typer.Option("--classes", help="Text file of class names, one per line, in the order of the labels.")
]


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="Image folder (sub-folders are classes), idx file of images, or CIFAR's archive; with --bundled, OUT."
        ),
    ],
    out: Annotated[Path | None, typer.Argument(help="New folder for the shards and their index.")] = None,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Pack the photographs and digits that ship inside installed packages.")
    ] = False,
    resize: Annotated[int | None, typer.Option(min=1, help="Shrink larger shorter sides to this, pixels.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave undecodable images out and list them.")] = False,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size at which a new shard begins, MB.")] = 500.0,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP",
            help="Take these positions of the fixed shuffled order only; ranges that do not overlap are disjoint "
            "random splits.",
        ),
    ] = None,
    classes: ClassesOption = None,
    split: Annotated[str | None, typer.Option(metavar="train|test", help="Which part of a CIFAR archive.")] = None,
) -> None:
    """Pack images into webdataset shards with an index."""
    from aimscale.harness.data import DataError
    from aimscale.harness.data.store.benchmarks import SPLITS, is_cifar, is_idx, pack_cifar, pack_idx
    from aimscale.harness.data.store.bundled import FOLDERS, write_bundled
    from aimscale.harness.data.store.pack import pack_folder

    if bundled:
        if out is not None:
            raise DataError("data pack --bundled takes one folder, the output")
        write_bundled(source)
        print(f"wrote {len(FOLDERS)} data sets under {source}: {', '.join(FOLDERS)}")
        return
    if out is None:
        raise DataError(f"data pack needs an output folder: aimscale data pack {source} OUT")
    skipped: list[Path] = []
    num_transparent = 0
    part = _read_part(images)
    if is_cifar(source) and not is_idx(source):
        if split not in SPLITS:
            raise DataError(f"{source} holds two data sets; choose one with --split train or --split test")
        info = pack_cifar(source, out, split=split, classes=_read_classes(classes), part=part)
    elif is_idx(source):
        info = pack_idx(source, out, classes=_read_classes(classes), part=part)
    else:
        if classes is not None:
            raise DataError("--classes is for idx files, CIFAR and data index; a folder's classes are its sub-folders")
        info, skipped, num_transparent = pack_folder(
            source, out, resize=resize, skip_bad=skip_bad, part=part, max_shard_bytes=shard_mb * 1e6
        )
    for path in skipped:
        print(f"left out, cannot be decoded: {os.fsencode(path).decode(errors='backslashreplace')}")
    if num_transparent:
        have = "image has" if num_transparent == 1 else "images have"
        print(f"{num_transparent:,} {have} transparent pixels, which are read as white")
    print(f"wrote {out}: {info.num_samples:,} images, {len(info.classes or ())} classes, {info.num_shards} shards")


@app.command()
def index(
    shards: Annotated[
        str,
        typer.Argument(help="Folder or URL of tar shards, or FOLDER/NAME-{000..123}.tar where the server cannot list."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the index when the shards are remote or read-only; default: beside them."),
    ] = None,
    classes: ClassesOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; each reads one shard at a time.")] = 1,
) -> None:
    """Read every shard once and write index.parquet and dataset.json."""
    from aimscale.harness.data import DataError
    from aimscale.harness.data.store.indexing import expand_shards, index_shards
    from aimscale.harness.data.store.shards import is_url

    location, names = expand_shards(shards)
    if is_url(location) and out is None:
        raise DataError(f"the index of {location} needs a local folder: add --out FOLDER")
    if out is None and not Path(location).is_dir():
        raise DataError(f"shard folder {location} does not exist")
    info = index_shards(
        location,
        out or Path(location),
        names=names,
        classes=_read_classes(classes),
        num_workers=workers,
        progress=_show_progress,
    )
    print(f"wrote the index of {out or location}: {info.num_samples:,} images, {info.num_bad:,} undecodable")


@app.command()
def info(folder: Annotated[str, typer.Argument(help="Folder or URL with an index.")]) -> None:
    """Show counts, classes and resolutions of an indexed data set."""
    import numpy as np

    from aimscale.harness.data.store.index import open_dataset

    dataset = open_dataset(folder)
    facts = dataset.info
    lines = [
        ("images", f"{facts.num_samples:,}, {facts.num_bad:,} undecodable"),
        ("shards", f"{facts.num_shards:,} at {dataset.location}, {facts.total_bytes / 1e6:,.1f} MB"),
    ]
    if dataset.num_usable:
        shorter = np.minimum(dataset.width, dataset.height)[dataset.ok]
        spread = f"median {int(np.median(shorter)):,} px, within {shorter.min():,}..{shorter.max():,}"
        lines.append(("shorter side", spread))
    if dataset.labels is None:
        lines.append(("classes", "no labels"))
    else:
        counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=dataset.num_classes)
        lines.append(("classes", f"{len(counts):,}, with {counts.min():,} to {counts.max():,} images each"))
        lines.append(("unlabelled", f"{facts.num_samples - counts.sum():,}"))
    lines += [("undecodable", dataset.describe(int(i))) for i in dataset.index.bad[:_LISTED_BAD]]
    print(f"{facts.name}  ({folder})")
    for name, text in [*lines, ("fingerprint", facts.fingerprint)]:
        print(f"  {name:<14} {text}")


def _read_part(text: str | None) -> tuple[int, int] | None:
    from aimscale.harness.data import DataError

    if text is None:
        return None
    try:
        start, stop = (int(number) for number in text.split(":"))
    except ValueError as error:
        raise DataError(f"--images {text} is no range; write START:STOP, as in 0:50000") from error
    return start, stop


def _read_classes(path: Path | None) -> tuple[str, ...] | None:
    from aimscale.harness.data import DataError

    if path is None:
        return None
    try:
        return tuple(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read class names from {path}: {error}") from error


def _show_progress(num_done: int, num_shards: int, num_images: int) -> None:
    end = "\r" if sys.stderr.isatty() and num_done < num_shards else "\n"
    print(f"indexed {num_done}/{num_shards} shards, {num_images:,} images", end=end, file=sys.stderr, flush=True)
