from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aimscale.harness.bench import data as bench_data
from aimscale.harness.data.store.decoding import decode
from aimscale.harness.data.store.pack import write_dataset
from aimscale.harness.data.stream.augment import crop_resize
from aimscale.harness.device.gpu_specs import store_rate, stored_rate


def test_the_limit_makes_the_streams_pixels() -> None:
    data = next(iter(bench_data._photographs(1))).data
    box = (10, 30, 300, 320, True)
    assert torch.equal(bench_data.bare_reader(data, box), crop_resize(decode(data), box, 224))


def test_bench_reports_every_number_and_remembers_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIMSCALE_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    result = bench_data.run(seconds=0.3, workers=[0, 1], num_images=32)
    rows = capsys.readouterr().err.splitlines()
    assert [row.partition(":")[0] for row in rows] == ["one thread", "0 workers", "1 workers"]
    assert torch.get_num_threads() == threads
    assert min(result["stream"], result["limit"]) > 0
    assert 0 < result["share"] < 2
    assert [row["workers"] for row in result["loader"]] == [0, 1]
    assert all(row["images_per_s"] > 0 for row in result["loader"])
    assert all(0 < row["cpu_share"] < 3 for row in result["loader"])
    assert stored_rate("decoded_per_s") == result["stream"]
    store_rate("decoded_per_s", result["stream"] / 2)  # of a busier hour
    assert stored_rate("decoded_per_s") == result["stream"]


def test_bench_reads_a_data_set_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "mine", bench_data._photographs(40))
    rows = bench_data.run_on(f"file://{tmp_path}/mine", seconds=0.2, workers=[0])
    assert [row["workers"] for row in rows] == [0]
    assert min(rows[0]["images_per_s"], rows[0]["images_per_cpu_s"]) > 0
    assert len(capsys.readouterr().err.splitlines()) == 1
