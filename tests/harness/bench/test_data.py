from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aimscale.harness.bench import data as bench_data
from aimscale.harness.data.store.pack import write_dataset


@pytest.mark.parametrize("is_own", [False, True])
def test_the_loader_is_measured_on_photographs_and_on_a_data_set(
    is_own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "NUM_IMAGES", 32)
    write_dataset(tmp_path / "mine", bench_data.photograph_jpegs(40))
    threads = torch.get_num_threads()
    rows = bench_data.run(f"file://{tmp_path}/mine" if is_own else None, seconds=0.3, workers=[0, 1])
    assert torch.get_num_threads() == threads
    assert [row["workers"] for row in rows] == [0, 1]
    assert all(min(row["images_per_s"], row["images_per_cpu_s"]) > 0 for row in rows)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["0 workers", "1 workers"]
