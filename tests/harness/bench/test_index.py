from __future__ import annotations

from pathlib import Path

from aimscale.harness.bench.index import run, table


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    small, large = (run(num_images=number, num_ranks=2, num_reads=300, folder=tmp_path) for number in (2000, 4_000_000))
    assert large["bytes"] > 20 * 4_000_000
    assert large["memory_mb"] < small["memory_mb"] + 20, "a fifth of what the columns take"
    assert not [*tmp_path.iterdir()]
    assert min(large[name] for name in ("open_s", "reads_per_s", "overlap_s")) > 0
    assert "index of 4,000,000 images" in table(large)
