"""The paper's fifteen benchmarks: names, sizes, splits and what to download; `benchmark_readers` reads their files.

`benchmarks.json` has them in the order of the paper's Table 6. Sizes and classes: AIMv2 (arXiv 2411.14402), Table B1;
iWildCam from WILDS (arXiv 2012.07421), because that table leaves it out. Torch is not imported.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from aimscale.aim.errors import did_you_mean
from aimscale.harness.data import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the paper's benchmarks."""

    name: str
    """The task's name in configurations and tables."""
    num_classes: int
    counts: Mapping[str, int]
    """Images by split, under the owners' names; `train` is what probes train on."""
    scored: str | None
    """The split that is scored; None if the paper does not say which it is."""
    origin: str
    """Publisher, and what to download."""
    layout: str
    """Description of the files to give to `aimscale data pack`."""

    @property
    def num_train(self) -> int:
        """Images of the training split."""
        return self.counts["train"]

    @property
    def num_test(self) -> int | None:
        """Images of the split that is scored."""
        return self.counts[self.scored] if self.scored else None


_FILE = Path(__file__).with_suffix(".json")
BENCHMARKS = {name: Benchmark(name=name, **fields) for name, fields in json.loads(_FILE.read_text()).items()}
"""Benchmarks by name."""


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name; DataError if there is none of that name."""
    if name not in BENCHMARKS:
        raise DataError(f"'{name}' is none of the benchmarks; {did_you_mean(name, BENCHMARKS, 'they are')}")
    return BENCHMARKS[name]


def describe(name: str) -> str:
    """Describe what to download for one benchmark, or for `all`, and how to pack it: some lines each."""
    lines = []
    for benchmark in BENCHMARKS.values() if name == "all" else [find_benchmark(name)]:
        lines += [f"{benchmark.name}: {benchmark.origin}", f"  SOURCE is {benchmark.layout}"]
        command = f"  aimscale data pack SOURCE OUT --benchmark {benchmark.name} --split"
        lines += [f"{command} {split}  # {number:,} images" for split, number in benchmark.counts.items()]
    return "\n".join(lines)
