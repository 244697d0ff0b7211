"""What an index of very many images costs: opening it, memory of several ranks, random reads, the overlap check.

The index is made up (random offsets, sides and checksums, no shards behind it) in the real format, under a folder that
is deleted afterwards: 24 bytes per image.
"""

from __future__ import annotations

import os
import tempfile
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from aimscale.harness.data.processes import heed_signals, start_process
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.columns import SAMPLE, IndexWriter, shard_table
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.info import DATASET_FILE, NO_LABEL
from aimscale.harness.data.stream.overlap import twins

_SAMPLES_PER_SHARD = 10_000
_BLOCK_ROWS = 1 << 20
_NUM_HELD_OUT = 50_000
_READS_AT_ONCE = 32  # a micro-batch


def run(*, num_images: int, num_ranks: int, num_reads: int, folder: Path | None = None) -> dict[str, Any]:
    """Make an index of `num_images`, open it in `num_ranks` processes at once and read `num_reads` positions in each.

    Returns:
        `bytes` on disk; `open_s`, the slowest rank's; `memory_mb`, what opening and reading added to the memory that
        all ranks hold together, and `memory_mb_of_rank` the largest single one; `reads_per_s` of the slowest rank
        (position to row: permutation, subset and index); `overlap_s`, one comparison with 50,000 held-out images.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        made, held_out = Path(root) / "made", Path(root) / "held-out"
        _make(made, num_images, seed=0)
        _make(held_out, min(_NUM_HELD_OUT, num_images), seed=1)
        pipes = [Pipe() for _ in range(num_ranks)]
        processes = [start_process(_rank, theirs, made, rank, num_reads) for rank, (_, theirs) in enumerate(pipes)]
        before = _ask(pipes, "memory")
        opened, read, after = _ask(pipes, "open"), _ask(pipes, "read"), _ask(pipes, "memory")
        for process in processes:
            process.join()
        start = time.perf_counter()
        assert not list(twins([open_dataset(made)], open_dataset(held_out)))
        overlap_s = time.perf_counter() - start
        added = [late - early for early, late in zip(before, after, strict=True)]
        return {
            "images": num_images,
            "ranks": num_ranks,
            "reads": num_reads,
            "bytes": sum(path.stat().st_size for path in made.rglob("*") if path.is_file()),
            "open_s": max(opened),
            "memory_mb": sum(added) / 1000,
            "memory_mb_of_rank": max(added) / 1000,
            "reads_per_s": num_reads / max(read),
            "overlap_s": overlap_s,
        }


def table(result: dict[str, Any]) -> str:
    """The measurements for people."""
    ranks = f"{result['ranks']} ranks"
    rows = {
        "on disk": f"{result['bytes'] / 1e9:.2f} GB",
        "opened": f"in {result['open_s']:.3f} s by each of {ranks} at once",
        "memory": f"{result['memory_mb']:.1f} MB more for {ranks} after {result['reads']:,} reads each",
        "random reads": f"{result['reads_per_s']:,.0f} positions/s per rank",
        "overlap check": f"{result['overlap_s']:.1f} s against {_NUM_HELD_OUT:,} held-out images",
    }
    lines = [f"index of {result['images']:,} images", *(f"  {name:<15}{text}" for name, text in rows.items())]
    return "\n".join(lines)


def _make(folder: Path, num_images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    aside = folder / "columns"
    aside.mkdir(parents=True)
    writer = IndexWriter(aside)
    for first in range(0, num_images, _BLOCK_ROWS):
        number = min(_BLOCK_ROWS, num_images - first)
        samples = np.empty(number, SAMPLE)
        samples["offset"], samples["size"] = rng.integers(0, 1 << 30, number), rng.integers(10_000, 90_000, number)
        samples["width"], samples["height"] = rng.integers(200, 600, (2, number))
        samples["width"][::1000] = samples["height"][::1000] = 0  # undecodable
        writer.append(samples, rng.integers(0, 1 << 63, number, dtype=np.uint64), np.full(number, NO_LABEL))
    counts = [min(_SAMPLES_PER_SHARD, num_images - at) for at in range(0, num_images, _SAMPLES_PER_SHARD)]
    names = [f"{number:06d}.tar" for number in range(len(counts))]
    shards = shard_table(names, [1 << 31] * len(counts), counts)
    info = writer.finish(shards, name="made", classes=None, shards_at="memory://made")
    aside.rename(folder / info.index_folder)
    (folder / DATASET_FILE).write_text(info.to_json())


def _ask(pipes: list[tuple[Connection, Connection]], what: str) -> list[float]:
    """All ranks' answers; they work at the same time."""
    for ours, _ in pipes:
        ours.send(what)
    return [ours.recv() for ours, _ in pipes]


def _rank(pipe: Connection, folder: Path, rank: int, num_reads: int) -> None:
    """One process: says what it is asked for, and ends with the second look at its memory."""
    heed_signals()
    dataset: ShardDataset | None = None
    while True:
        what = pipe.recv()
        start = time.perf_counter()
        if what == "open":
            dataset = open_dataset(folder)
            pipe.send(time.perf_counter() - start)
        elif what == "read":
            assert dataset is not None, "_rank: asked to read before opening"
            _read(dataset, rank, num_reads)
            pipe.send(time.perf_counter() - start)
        else:
            pipe.send(_held_kb(folder))
            if dataset is not None:
                return


def _read(dataset: ShardDataset, rank: int, num_reads: int) -> None:
    """Positions to rows, as a stream that is too long to be listed does it."""
    number = dataset.num_usable
    for first in range(rank * num_reads, (rank + 1) * num_reads, _READS_AT_ONCE):
        positions = np.arange(first, min(first + _READS_AT_ONCE, (rank + 1) * num_reads)) % number
        samples = dataset.usable(permute(permute(positions, number, make_key("epoch")), number, make_key("subset")))
        dataset.sides(samples)
        for sample in samples.tolist():
            dataset.places([sample])


def _held_kb(folder: Path) -> float:
    """What this process holds by itself, and its share of the index's mapped files.

    Not of all that it maps: its share of the libraries grows whenever another program that uses them ends.
    """
    held, is_index = 0.0, False
    for line in Path(f"/proc/{os.getpid()}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous" or (name == "Pss" and is_index):
            held += float(value.split()[0])
        elif "-" in name.split(" ")[0]:  # the first line of a mapping, which names its file
            is_index = str(folder) in line
    return held
