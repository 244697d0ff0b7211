from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aimscale.harness.bench import data as bench_data
from aimscale.harness.bench.bare_reader import readers
from aimscale.harness.data.store.decoding import decode
from aimscale.harness.data.stream.augment import crop_resize
from aimscale.harness.data.stream.positions import TrainStream


def test_readers_agree_on_the_pixels() -> None:
    data = next(iter(bench_data._photographs(1))).data
    box = (10, 30, 300, 320, True)
    expected = crop_resize(decode(data), box, 224).int()
    assert {"simplejpeg + torch", "torchvision", "Pillow"} <= readers().keys()
    for name, read in readers().items():
        difference = (read(data, box).int() - expected).abs()
        assert difference.float().mean() < 0.6, name
        assert difference.max() <= (12 if name == "Pillow" else 0), name


def test_bench_reports_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "_ROUNDS", 1)
    threads = torch.get_num_threads()
    result = bench_data.run(num_images=32, seconds=0.3, workers=[0, 1])
    assert torch.get_num_threads() == threads
    assert result["fastest_limit"] == max(result["single_thread"][name] for name in readers())
    rows = [(row["workers"], row["augment_on"]) for row in result["loader"]]
    assert rows == [(0, "loader"), (0, "device"), (1, "loader"), (1, "device")]
    assert {row["kb_per_image"] for row in result["loader"] if row["augment_on"] == "loader"} == {3 * 224**2 / 1000}
    assert all(200 < row["kb_per_image"] < 563 for row in result["loader"] if row["augment_on"] == "device")
    rates = [
        *result["single_thread"].values(),
        *result["small"].values(),
        *(row["images_per_s"] for row in result["loader"]),
        *result["jitter"].values(),
        result["device"]["images_per_s"],
    ]
    assert np.min(rates) > 0
    assert all(0 < result[name] < 2 for name in ("stream_share", "minimal_share", "stream_of_minimal"))
    assert all(0 < row[name] < 3 for row in result["loader"] for name in ("share", "cpu_share"))
    text = bench_data.table(result)
    assert "minimal loop" in text
    assert "training stream" in text
    assert text.count("resizing left to the device") == 2
    assert f"{result['fastest_limit']:,.0f}" in text


def test_the_minimal_loop_stores_what_the_bare_reader_gives(tmp_path: Path) -> None:
    stream = TrainStream(bench_data._config(tmp_path / "data", bench_data._photographs(20), 224))
    work = bench_data._work(stream, 20)
    into = torch.zeros(32, 3, 224, 224, dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        read = bench_data._shard_reader(stream, 20, stack)
        bench_data._minimal_turn(read, work, into.split(1), 32)
    reader = readers()["simplejpeg + torch"]
    for row in range(32):
        assert torch.equal(into[row], reader(*work[(32 + row) % 20])), row


def test_processor_time_is_that_of_all_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    before = bench_data._cpu_s([process.pid])
    while bench_data._cpu_s([process.pid]) - bench_data._cpu_s([]) < 0.1:
        pass
    assert bench_data._cpu_s([process.pid]) > before + 0.05
    process.kill()
    process.wait()
