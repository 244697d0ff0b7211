"""A data set may be a stranger's: nothing of it is executed, waited for or read without end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aimscale.aim.errors import UserError
from aimscale.harness.data import DataError
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.data.store.shards import open_file, read_bytes
from aimscale.harness.weights import WeightsError, read_hub_config


@pytest.fixture
def copied(small_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "set"))


@pytest.mark.parametrize(
    "url",
    ["reference://::file:///x", "reference://x", "zip://a.tar::http://host/b.zip", "blockcache://x", "dir://x",
     "python://x", "github://a:b@c/d", "ssh://host/x", "file:///a::memory://b"],
)  # fmt: skip
def test_an_index_leads_to_no_other_protocol(url: str, copied: Path) -> None:
    info = json.loads((copied / "dataset.json").read_text())
    (copied / "dataset.json").write_text(json.dumps(info | {"shards_at": url}))
    for use in (lambda: open_dataset(copied).read(0), lambda: read_bytes(f"{url}/dataset.json")):
        with pytest.raises((DataError, OSError), match="no address that is read"):
            use()
    with pytest.raises(DataError, match="no address"):
        open_file(url)


@pytest.mark.parametrize("change", [{"fingerprint": "/../../../../x"}, {"shards_at": 3}])
def test_a_description_of_other_types_is_refused(change: dict[str, Any], copied: Path) -> None:
    info = json.loads((copied / "dataset.json").read_text())
    (copied / "dataset.json").write_text(json.dumps(info | change))
    with pytest.raises(DataError, match=next(iter(change))):
        open_dataset(copied)


@pytest.mark.parametrize(
    "name", ["dataset.json", "samples.npy", "shards.npy", "checksum.npy", "bad.npy", "bad_before.npy"]
)
def test_a_pipe_is_not_waited_for(name: str, copied: Path) -> None:
    (path,) = copied.rglob(name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="pipe"):
        open_dataset(copied)


def test_a_sparse_description_is_not_read(copied: Path) -> None:
    os.truncate(copied / "dataset.json", 10**11)
    with pytest.raises(UserError, match="bytes"):
        open_dataset(copied)


def test_no_pickle_in_an_index_is_loaded(copied: Path, tmp_path: Path) -> None:
    class MakesFolder:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    for path in copied.rglob("*.npy"):
        whole = path.read_bytes()
        np.save(path, np.array([MakesFolder()], object))
        with pytest.raises(DataError):
            open_dataset(copied)
        path.write_bytes(pickle.dumps(MakesFolder()))
        with pytest.raises(DataError):
            open_dataset(copied)
        path.write_bytes(whole)
    assert not (tmp_path / "made").exists()
    open_dataset(copied)


def test_no_bit_of_an_indexs_header_makes_a_traceback(copied: Path) -> None:
    (path,) = copied.rglob("samples.npy")
    whole = path.read_bytes()
    for place in range(0, 8 * 128, 3):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            open_dataset(copied)


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", text) for text in ('{"label": NaN}', '{"label": true}', '{"cls": 1.5}')]
    + [("a.cls", text) for text in ("1_0", "", "x", "1.0", "٣")],
)  # fmt: skip
def test_a_label_that_is_no_class_number_is_refused(name: str, text: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for each in ("a.png", name):
            tar.add(tmp_path / each, each)
    with pytest.raises(DataError, match="no class number"):
        index_shards(str(tmp_path), tmp_path / "out", names=["s.tar"])


@pytest.mark.parametrize("blocks", [10**12, 10**30])
def test_a_hubs_description_of_endless_blocks_is_refused(blocks: int, tmp_path: Path) -> None:
    values = {"img_size": 224, "embed_dim": 64, "num_blocks": 10**30, "num_heads": 2, "probe_layers": blocks}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"config\.json"):
        read_hub_config(tmp_path / "model.safetensors")
