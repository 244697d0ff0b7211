from __future__ import annotations

import torch

from aimscale.harness.bench import data as bench_data
from aimscale.harness.data.store.decoding import decode
from aimscale.harness.data.stream.augment import crop_resize


def test_the_limit_makes_the_streams_pixels() -> None:
    data = next(iter(bench_data._photographs(1))).data
    box = (10, 30, 300, 320, True)
    assert torch.equal(bench_data.bare_reader(data, box), crop_resize(decode(data), box, 224))


def test_bench_reports_every_number() -> None:
    threads = torch.get_num_threads()
    result = bench_data.run(seconds=0.3, workers=[0, 1], num_images=32)
    assert torch.get_num_threads() == threads
    assert min(result["stream"], result["limit"]) > 0
    assert 0 < result["share"] < 2
    assert [row["workers"] for row in result["loader"]] == [0, 1]
    assert all(row["images_per_s"] > 0 for row in result["loader"])
    assert all(0 < row["cpu_share"] < 3 for row in result["loader"])
