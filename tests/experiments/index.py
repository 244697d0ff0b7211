"""What an index of very many images costs: opening, memory and random reads of four processes, the overlap check.

    python tests/experiments/index.py 200000000

The index is made up (random offsets, sides and checksums, no shards behind it), 24 bytes per image under /tmp.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.card import DATASET_FILE, NO_LABEL
from aimscale.harness.data.store.columns import SAMPLE, IndexWriter, shard_table
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.stream.overlap import twins

NUM_RANKS, NUM_READS, MICRO_BATCH, NUM_HELD_OUT, BLOCK = 4, 10_000, 32, 50_000, 1 << 20


def make(folder: Path, num_images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    aside = folder / "columns"
    aside.mkdir(parents=True)
    writer = IndexWriter(aside)
    for first in range(0, num_images, BLOCK):
        samples = np.empty(min(BLOCK, num_images - first), SAMPLE)
        samples["offset"] = rng.integers(0, 1 << 30, len(samples))
        samples["size"] = rng.integers(10_000, 90_000, len(samples))
        samples["width"], samples["height"] = rng.integers(200, 600, (2, len(samples)))
        samples["width"][::1000] = samples["height"][::1000] = 0  # undecodable
        checksums = rng.integers(0, 1 << 63, len(samples), dtype=np.uint64)
        writer.append(samples, checksums, np.full(len(samples), NO_LABEL))
    counts = [min(10_000, num_images - at) for at in range(0, num_images, 10_000)]
    shards = shard_table([f"{number:06d}.tar" for number in range(len(counts))], [1 << 31] * len(counts), counts)
    info = writer.finish(shards, name="made", classes=None, shards_at="memory://made")
    aside.rename(folder / info.index_folder)
    (folder / DATASET_FILE).write_text(info.to_json())


def held_kb(folder: Path) -> float:
    """What this process holds by itself, and its share of the index's mapped files."""
    held, is_index = 0.0, False
    for line in Path(f"/proc/{os.getpid()}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous" or (name == "Pss" and is_index):
            held += float(value.split()[0])
        elif "-" in name.split(" ")[0]:  # the first line of a mapping, which names its file
            is_index = str(folder) in line
    return held


def read(folder: Path, rank: int) -> tuple[float, float, float]:
    """Seconds to open and to read, and kB added, while the other ranks do the same."""
    before, started = held_kb(folder), time.perf_counter()
    dataset = open_dataset(folder)
    opened, number = time.perf_counter(), dataset.num_usable
    for first in range(rank * NUM_READS, (rank + 1) * NUM_READS, MICRO_BATCH):
        positions = permute(np.arange(first, first + MICRO_BATCH) % number, number, make_key("epoch"))
        samples = dataset.usable(permute(positions, number, make_key("subset")))
        dataset.sides(samples)
        for sample in samples.tolist():
            dataset.places([sample])
    return opened - started, time.perf_counter() - opened, held_kb(folder) - before


def main(num_images: int) -> None:
    with tempfile.TemporaryDirectory() as root, multiprocessing.get_context("spawn").Pool(NUM_RANKS) as pool:
        folder, held_out = Path(root) / "made", Path(root) / "held-out"
        make(folder, num_images, 0)
        make(held_out, min(NUM_HELD_OUT, num_images), 1)
        found = pool.starmap(read, [(folder, rank) for rank in range(NUM_RANKS)], chunksize=1)
        opened, took, added = zip(*found, strict=True)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        started = time.perf_counter()
        assert not list(twins([open_dataset(folder)], open_dataset(held_out)))
        print(
            f"{num_images:,} images: {size / 1e9:.2f} GB on disk, opened in {max(opened):.3f} s by each of {NUM_RANKS} "
            f"processes, which hold {sum(added) / 1000:.1f} MB more after {NUM_READS:,} reads each at "
            f"{NUM_READS / max(took):,.0f}/s; {time.perf_counter() - started:.1f} s to compare with {NUM_HELD_OUT:,}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
