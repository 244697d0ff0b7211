"""`aimscale data`: images to indexed shards."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from aimscale.aim.errors import some
from aimscale.harness.log.progress import Bar

if TYPE_CHECKING:
    from aimscale.harness.data.store.listing import Listing
    from aimscale.harness.data.store.pack import Packed

app = typer.Typer(help="Images to indexed shards: pack, index, info.", no_args_is_help=True, add_completion=False)

_LISTED_BAD = 5
_PARTS = ("train", "validation", "test")  # of a source that is split
ClassesOption = Annotated[
    Path | None, typer.Option("--classes", help="Text file of class names, one per line, in the order of the labels.")
]


@app.command()
def pack(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="SOURCE... OUT. Source: image folder (sub-folders are classes), Parquet files or a folder of them, "
            "idx file or benchmark. Out: new folder for the shards and their index; with --bundled, this alone."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the paper's fifteen, as its owners publish it. Without SOURCE: what to download (`all`).",
        ),
    ] = None,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Pack crops of the photographs that come with aimscale.")
    ] = False,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shrink images whose shorter side is longer than this, pixels.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave undecodable images out and list them.")] = False,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size at which a new shard begins, MB.")] = 500.0,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP",
            help="Take these positions of the fixed shuffled order only, or per cent of it (80%:90%); ranges that do "
            "not overlap are disjoint random splits.",
        ),
    ] = None,
    classes: ClassesOption = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="image=A,label=B", help="Columns of Parquet files, where several could be meant."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|A/B/C",
            help="Of a benchmark: train, val, test. Else shares in per cent: 80/10/10 makes OUT/train, OUT/validation "
            "and OUT/test, disjoint.",
        ),
    ] = None,
) -> None:
    """Pack images into webdataset shards with an index."""
    from aimscale.harness.data import DataError

    if benchmark and not paths:
        from aimscale.harness.data.store.benchmarks import describe

        print(describe(benchmark))
    elif not paths or (len(paths) < 2 and not bundled):
        raise DataError("data pack needs a source and an output folder: aimscale data pack SOURCE OUT")
    elif bundled:
        from aimscale.harness.data.store.bundled import FOLDERS, write_bundled

        if len(paths) > 1 or benchmark or split or images or classes or columns or resize or skip_bad:
            raise DataError(f"data pack --bundled {paths[0]} takes one folder, the output, and no other option")
        write_bundled(paths[0])
        print(f"wrote {len(FOLDERS)} data sets under {paths[0]}: {', '.join(FOLDERS)}")
    else:
        from aimscale.harness.data.store.pack import pack_images, shuffled_order

        *sources, out = paths
        with Bar() as bar:
            listing = _list(sources, out, benchmark, split, _read_classes(classes), columns, bar)
            to = functools.partial(
                pack_images, listing, resize=resize, skip_bad=skip_bad, max_shard_bytes=shard_mb * 1e6, progress=bar
            )
            if split is None or benchmark:
                packed = {out: to(out, order=shuffled_order(len(listing.images), images))}
            elif images is None:
                packed = _pack_parts(to, out, listing, _read_shares(split))
            else:
                raise DataError("--split cuts all of a source; give it or --images")
        for folder, count in packed.items():
            _tell(folder, count)
        if endings := Counter(listing.left_out).most_common(5):
            listed = ", ".join(f"{number:,} {ending}" for ending, number in endings)
            print(f"left out: {listed} (no image format that is read)")
        if listing.empty:
            print(f"warning: no classes, since they hold no image: {some(listing.empty)}")
        _say_next(*packed)


def _pack_parts(to: Callable[..., Packed], out: Path, listing: Listing, shares: dict[str, int]) -> dict[Path, Packed]:
    """Pack a source, cut into shares, to folders within a new one, and say how it was cut."""
    from aimscale.harness.data.store.pack import new_folder, split_images

    cut = split_images(listing, shares)
    with new_folder(out) as folder:
        packed = {out / name: to(folder / name, order=order) for name, order in cut.parts.items()}
    if cut.num_together:
        print(f"{cut.num_together:,} duplicates kept in the part of their first copy")
    for part, absent in cut.absent.items():
        if absent:
            lost = f"{len(absent)} of {len(listing.classes or ())} classes"
            print(f"warning: {out / part} has no image of {lost}: {some(absent)}")
    return packed


def _list(
    sources: list[Path],
    out: Path,
    benchmark: str | None,
    split: str | None,
    classes: tuple[str, ...] | None,
    columns: str | None,
    progress: Bar,
) -> Listing:
    """List the images of a source."""
    from aimscale.harness.data import DataError
    from aimscale.harness.data.store.benchmark_readers import list_benchmark
    from aimscale.harness.data.store.listing import Listing, list_folder, list_idx
    from aimscale.harness.data.store.pack import check_new
    from aimscale.harness.data.store.parquet import ENDING, find_parquet, read_parquet

    source = sources[0]
    parquet = {} if benchmark else {each: find_parquet(each) for each in sources}
    if files := [file for of_source in parquet.values() for file in of_source]:
        if classes is not None:
            raise DataError("--classes is for idx files and data index; Parquet files name their classes")
        check_new(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        if strangers := [each for each, of_source in parquet.items() if not of_source]:
            raise DataError(f"{strangers[0]} is no Parquet file ({ENDING}); give sources of one kind")
        table = read_parquet(files, out.parent, _read_columns(columns), progress)
        return Listing(source=source, images=table.images, labels=table.labels, classes=table.classes)
    if len(sources) > 1:
        raise DataError(f"data pack takes one source unless they are Parquet files; {sources[1]} is another one")
    if columns is not None:
        raise DataError("--columns is for Parquet files")
    if "images-idx3-ubyte" in source.name and not benchmark:
        return list_idx(source, classes)
    if classes is not None:
        raise DataError("--classes is for idx files and data index; folders and benchmarks have names of their own")
    return list_benchmark(benchmark, source, split) if benchmark else list_folder(source)


def _read_columns(text: str | None) -> dict[str, str]:
    """Parse `image=A,label=B`."""
    from aimscale.harness.data import DataError

    pairs = [part.partition("=") for part in (text or "").split(",") if part]
    if not all(role in ("image", "label") and name for role, _, name in pairs):
        raise DataError(f"--columns {text}: write image=COLUMN, label=COLUMN, or both with a comma")
    return {role: name for role, _, name in pairs}


def _tell(out: Path, packed: Packed) -> None:
    """Print what was packed, and what of it a user should know."""
    for name in packed.skipped:
        print(f"left out, cannot be decoded: {os.fsencode(name).decode(errors='backslashreplace')}")
    if packed.num_transparent:
        have = "image has" if packed.num_transparent == 1 else "images have"
        print(f"{packed.num_transparent:,} {have} transparent pixels, which are read as white")
    info = packed.info
    print(f"wrote {out}: {info.num_samples:,} images, {len(info.classes or ())} classes, {info.num_shards} shards")


def _say_next(*folders: Path | str) -> None:
    """Print what to do next with packed or indexed data: look at it, and name it in a sweep file."""
    first = str(folders[0])
    if {Path(folder).name for folder in folders} >= {"train", "validation"}:
        parent = Path(first).parent
        file = re.sub(r"[^A-Za-z0-9-]+", "-", parent.name).strip("-") or "mysweep"
        print(f"next: aimscale init {file}.yaml --data {shlex.quote(str(parent))} --hours 1")
        return
    base: dict[str, Any] = {"data": {"sources": [{"path": first}]}}
    print(f"next: aimscale data info {shlex.quote(first)}")
    print(f"in a sweep file: {yaml.safe_dump({'base': base}, default_flow_style=True, width=math.inf)[1:-2]}")


def _read_shares(text: str) -> dict[str, int]:
    """Parse `80/10/10` into per cent for each of the folders; those of 0 are left out."""
    from aimscale.harness.data import DataError

    shares = [int(share) if share.isdecimal() else -1 for share in text.split("/")]
    if len(shares) != 3 or min(shares) < 0 or sum(shares) != 100:
        raise DataError(f"--split {text}: without --benchmark, give per cent that add up to 100, as 80/10/10")
    return {name: share for name, share in zip(_PARTS, shares, strict=True) if share}


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
    with Bar() as bar:
        info = index_shards(
            location,
            out or Path(location),
            names=names,
            classes=_read_classes(classes),
            num_workers=workers,
            progress=bar,
        )
    print(f"wrote the index of {out or location}: {info.num_samples:,} images, {info.num_bad:,} undecodable")
    _say_next(out or location)


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
    if facts.num_usable:
        shorter = np.minimum(*dataset.sides(dataset.usable()))
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


def _read_classes(path: Path | None) -> tuple[str, ...] | None:
    """Read class names from a file."""
    from aimscale.harness.data import DataError
    from aimscale.harness.run.files import read_file

    if path is None:
        return None
    try:
        return tuple(read_file(path).decode().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read class names from {path}: {error}") from error
