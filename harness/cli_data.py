"""`aimscale data`: images to indexed shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Images to indexed shards: pack, index, info.", no_args_is_help=True)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Image folder (sub-folders are classes); with --bundled, the output.")],
    out: Annotated[Path | None, typer.Argument(help="New folder for the shards and their index.")] = None,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Pack the photographs and digits that ship inside installed packages.")
    ] = False,
    resize: Annotated[int | None, typer.Option(min=1, help="Shrink shorter sides above this to it, pixels.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave undecodable images out and list them.")] = False,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size at which a new shard begins, MB.")] = 500.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that index the shards.")] = 1,
) -> None:
    """Pack images into webdataset shards with an index."""
    from harness.data.bundled import FOLDERS, write_bundled
    from harness.data.index import DataError
    from harness.data.pack import pack_folder

    if bundled:
        if out is not None:
            raise DataError("data pack --bundled takes one folder, the output")
        write_bundled(source)
        print(f"wrote {len(FOLDERS)} data sets under {source}: {', '.join(FOLDERS)}")
        return
    if out is None:
        raise DataError(f"data pack needs an output folder: aimscale data pack {source} OUT")
    info, skipped = pack_folder(
        source, out, resize=resize, skip_bad=skip_bad, max_shard_bytes=shard_mb * 1e6, num_workers=workers
    )
    for path in skipped:
        print(f"left out, cannot be decoded: {path}")
    print(f"wrote {out}: {info.num_samples} images, {len(info.classes or ())} classes, {len(info.shards)} shards")


@app.command()
def index(
    folder: Annotated[str, typer.Argument(help="Folder of webdataset tar shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes; each reads one shard at a time.")] = 1,
) -> None:
    """Read every shard once and write index.parquet and dataset.json beside them."""
    from harness.data.index import DataError
    from harness.data.scan import scan_shards, write_scans

    shards = sorted(path.name for path in Path(folder).glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no .tar shards")
    info = write_scans(Path(folder), Path(folder).name, scan_shards(folder, shards, num_workers=workers), None)
    print(f"indexed {folder}: {info.num_samples} images in {len(info.shards)} shards, {info.num_bad} undecodable")


@app.command()
def info(
    folder: Annotated[str, typer.Argument(help="Folder of indexed shards.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe an indexed data set."""
    from harness.data.index import open_dataset

    dataset = open_dataset(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(dataset.info)))
        return
    print(
        f"{dataset.info.name}: {len(dataset)} images, {dataset.num_classes} classes, {dataset.info.num_bad} undecodable"
    )
