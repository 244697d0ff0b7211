from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from aimscale.harness.bench.index import run, table
from aimscale.harness.cli.bench import app


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    small, large = (run(num_images=number, num_ranks=2, num_reads=300, folder=tmp_path) for number in (2000, 4_000_000))
    assert large["bytes"] > 20 * 4_000_000
    assert large["memory_mb"] < small["memory_mb"] + 20, "a fifth of what the columns take"
    assert not [*tmp_path.iterdir()]
    assert min(large[name] for name in ("open_s", "reads_per_s", "overlap_s")) > 0
    assert "index of 4,000,000 images" in table(large)


def test_counts_have_units() -> None:
    done = CliRunner().invoke(app, ["index", "--images", "0.002M", "--ranks", "1", "--reads", "1k", "--json"])
    found = json.loads(done.stdout)
    assert (found["images"], found["reads"]) == (2000, 1000)
