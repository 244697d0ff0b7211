"""The index on disk: mapped columns, the format of before, and what a damaged one says."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aimscale.harness.data import DataError
from aimscale.harness.data.store import columns
from aimscale.harness.data.store.columns import SAMPLE, IndexWriter
from aimscale.harness.data.store.index import open_dataset


def test_the_mapped_columns_equal_the_table(small_set: Path) -> None:
    dataset = open_dataset(small_set)
    table = pq.read_table(small_set / "index.parquet")
    samples = dataset.index.samples.values
    for name in SAMPLE.names or ():
        assert (samples[name] == table[name].to_numpy()).all()
    assert (dataset.checksum == table["checksum"].to_numpy()).all()
    assert dataset.require_labels().tolist() == table["label"].to_pylist()
    assert [dataset.shard_of(i) for i in range(60)] == table["shard"].to_pylist()
    assert [dataset.key(i) for i in (0, 59)] == [table["key"][i].as_py() for i in (0, 59)]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read(17) == dataset.read(17)
    assert len(pickle.dumps(dataset)) < 10_000, "a mapped column was pickled by its content"


def test_usable_samples_are_counted_in_index_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        samples = np.zeros(1000, SAMPLE)
        samples["width"] = samples["height"] = np.where(rng.random(1000) < share, 0, 40)
        folder = tmp_path / f"{share}"
        folder.mkdir()
        writer = IndexWriter(folder)
        for part in np.array_split(samples, 7):
            writer.append(part, rng.integers(0, 2**63, len(part), dtype=np.uint64), np.full(len(part), -1))
        shards = columns.shard_table(["a.tar", "b.tar"], [10, 20], [400, 600])
        info = writer.finish(shards, name="x", classes=None, shards_at=None)
        folder.rename(tmp_path / info.index_folder)
        (tmp_path / "dataset.json").write_text(info.to_json())
        (tmp_path / "a.tar").write_bytes(bytes(10))
        (tmp_path / "b.tar").write_bytes(bytes(20))
        dataset = open_dataset(tmp_path)
        expected = np.flatnonzero(samples["width"])
        assert dataset.num_usable == len(expected)
        assert (dataset.usable(np.arange(len(expected))) == expected).all()
        assert (np.flatnonzero(dataset.ok) == expected).all()
        assert dataset.labels is None
        assert [dataset.shard_of(i) for i in (0, 399, 400, 999)] == [0, 0, 1, 1]


@pytest.mark.parametrize("damage", ["no columns", "other columns", "half", "null", "list"])
def test_a_damaged_index_is_one_sentence(small_set: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(small_set, tmp_path / "copy")
    info = open_dataset(small_set).info
    folder = tmp_path / "copy" / info.index_folder
    if damage == "no columns":
        shutil.rmtree(folder)
    elif damage == "other columns":
        np.save(folder / "samples.npy", np.zeros(3, SAMPLE))
    elif damage == "half":
        (folder / "checksum.npy").write_bytes((folder / "checksum.npy").read_bytes()[:200])
    else:
        (tmp_path / "copy" / "dataset.json").write_text({"null": "null", "list": "[[" * 5000}[damage])
    with pytest.raises(DataError, match=r"run `aimscale data index"):
        open_dataset(tmp_path / "copy")
