from __future__ import annotations

import numpy as np
import pytest
import torch

from aimscale.harness.bench import data as bench_data
from aimscale.harness.data.store.decoding import decode
from aimscale.harness.data.stream.augment import crop_resize


def test_readers_agree_on_the_pixels() -> None:
    data = next(iter(bench_data._photographs(1))).data
    box = (10, 30, 300, 320, True)
    expected = crop_resize(decode(data), box, 224).int()
    readers = bench_data._readers()
    assert {"simplejpeg + torch", "torchvision", "Pillow"} <= readers.keys()
    for name, read in readers.items():
        difference = (read(data, box).int() - expected).abs()
        assert difference.float().mean() < 0.6, name
        assert difference.max() <= (12 if name == "Pillow" else 0), name


def test_bench_reports_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "_ROUNDS", 1)
    threads = torch.get_num_threads()
    result = bench_data.run(num_images=32, seconds=0.3, workers=[0, 1])
    assert torch.get_num_threads() == threads
    assert result["fastest_limit"] == max(rate for name, rate in result["single_thread"].items() if name != "stream")
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
    assert 0 < result["stream_share"] < 2
    assert all(0 < row["share"] < 3 for row in result["loader"])
    text = bench_data.table(result)
    assert "training stream" in text
    assert text.count("resizing left to the device") == 2
    assert f"{result['fastest_limit']:,.0f}" in text
