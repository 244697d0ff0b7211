"""The index on disk: mapped columns, the format of before, and what a damaged one says."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aimscale.harness.data import DataError
from aimscale.harness.data.store.columns import SAMPLE
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


@pytest.mark.parametrize("damage", ["no columns", "other columns", "half"])
def test_a_damaged_index_is_one_sentence(small_set: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(small_set, tmp_path / "copy")
    info = open_dataset(small_set).info
    folder = tmp_path / "copy" / info.index_folder
    if damage == "no columns":
        shutil.rmtree(folder)
    elif damage == "other columns":
        np.save(folder / "samples.npy", np.zeros(3, SAMPLE))
    else:
        (folder / "checksum.npy").write_bytes((folder / "checksum.npy").read_bytes()[:200])
    with pytest.raises(DataError, match=r"run `aimscale data index"):
        open_dataset(tmp_path / "copy")
