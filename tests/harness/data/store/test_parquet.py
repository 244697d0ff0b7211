"""`data pack` of Parquet files as hubs ship them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import refused, say
from pictures import saved
from PIL import Image

from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.listing import Listing
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.data.store.parquet import read_parquet


def picture(seed: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind)


def write(path: Path, images: Sequence[Any], labels: Sequence[Any] | None, names: Sequence[str] | None = None) -> Path:
    """Write a table as the `datasets` package does: {bytes, path} and a ClassLabel, 100 rows a group."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns: dict[str, Any] = {"image": list(images)}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = {"_type": "ClassLabel", "names": list(names)} if names else {"_type": "Value"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=100)
    return path


def test_files_of_a_hub_become_shards_with_their_bytes_and_classes(tmp_path: Path) -> None:
    bytes_of = [picture(i, "jpeg" if i % 3 == 0 else "png") for i in range(130)]
    rows = [{"bytes": data, "path": f"n{i}.JPEG" if i % 3 == 0 else None} for i, data in enumerate(bytes_of)]
    labels = [i % 2 if i % 10 else -1 for i in range(130)]
    for part, start, stop in ((0, 0, 100), (1, 100, 130)):
        name = f"train-{part:05d}-of-00002.parquet"
        write(tmp_path / "set" / "data" / name, rows[start:stop], labels[start:stop], ("ant", "bee"))
    for source in ([tmp_path / "set"], sorted((tmp_path / "set" / "data").iterdir())):
        said = say("data", "pack", *source, tmp_path / "out" / str(len(source)))
        assert "130 images, 2 classes" in said
        dataset = open_dataset(tmp_path / "out" / str(len(source)))
        assert dataset.classes == ("ant", "bee")
        assert dataset.labels is not None
        expected = dict(zip(bytes_of, labels, strict=True))
        assert {dataset.read(i): dataset.labels[i] for i in range(130)} == expected
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1", "2"}  # nothing that waited there


def test_any_number_of_processes_packs_the_same_and_a_split_keeps_equal_images_together(tmp_path: Path) -> None:
    rows = [picture(i % 40) for i in range(60)]
    file = write(tmp_path / "all.parquet", rows, [f"class {i % 3}" for i in range(60)])
    fingerprints = set()
    for workers in (1, 2):
        table = read_parquet([file], tmp_path, {})
        listing = Listing(source=file, images=table.images, labels=table.labels, classes=table.classes)
        out = tmp_path / str(workers)
        fingerprints.add(pack_images(listing, out, num_workers=workers).info.fingerprint)
    assert len(fingerprints) == 1
    say("data", "pack", file, tmp_path / "parts", "--split", "50/25/25")
    parts = [open_dataset(tmp_path / "parts" / name) for name in ("train", "validation", "test")]
    contents = [{part.read(i) for i in range(len(part))} for part in parts]
    assert sum(map(len, parts)) == 60
    assert sum(map(len, contents)) == len(set.union(*contents)) == 40


def test_columns_are_chosen_where_several_could_be_meant(tmp_path: Path) -> None:
    table = pa.table({"jpg": [picture(1)], "mask": [picture(2)], "fine": [7], "cls": [None]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert "--columns image=jpg" in refused("data", "pack", tmp_path / "x.parquet", tmp_path / "out")
    say("data", "pack", tmp_path / "x.parquet", tmp_path / "out", "--columns", "image=jpg,label=fine")
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.read(0), dataset.require_labels().tolist(), dataset.num_classes) == (picture(1), [7], 8)
    say("data", "pack", tmp_path / "x.parquet", tmp_path / "plain", "--columns", "image=mask")
    assert open_dataset(tmp_path / "plain").labels is None


@pytest.mark.parametrize(
    ("make", "subject"),
    [
        (lambda path: path.write_bytes(b"PAR1 and then nothing"), "no Parquet file, or damaged"),
        (lambda path: write(path, [{"bytes": None, "path": "a/b.jpg"}], [0]), "names files (a/b.jpg)"),
        (lambda path: write(path, ["words"], [0]), "has no encoded images"),
        (lambda path: write(path, [picture(0)], [1.5]), "neither class numbers nor names"),
        (lambda path: write(path, [picture(0)], [5], ("ant", "bee")), "has class 5, and 2 names"),
        (lambda path: write(path, [picture(0), b"\x89PNG broken"], [0, 1]), "cannot be decoded"),
        (lambda path: write(path, [picture(0), None], [0, 1]), "cannot be decoded"),
        (lambda path: write(path, [], []), "has no encoded images"),
    ],
)
def test_bad_files_are_one_sentence_and_leave_nothing(tmp_path: Path, make: Any, subject: str) -> None:
    make(tmp_path / "bad.parquet")
    assert subject in refused("data", "pack", tmp_path / "bad.parquet", tmp_path / "out" / "set")
    assert not [*(tmp_path / "out").glob("*")]


def test_a_table_beside_image_files_is_left_out(tmp_path: Path) -> None:
    """As hubs' image folders have one: `metadata.parquet`."""
    write(tmp_path / "set" / "metadata.parquet", [picture(0)], [0])
    (tmp_path / "set" / "a.png").write_bytes(picture(1))
    assert "left out: 1 .parquet" in say("data", "pack", tmp_path / "set", tmp_path / "out")
    assert open_dataset(tmp_path / "out").read(0) == picture(1)


def test_a_folder_of_two_splits_and_sources_of_two_kinds_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "set" / f"{split}-00000-of-00001.parquet", [picture(0)], [0])
    assert "holds the splits test, train" in refused("data", "pack", tmp_path / "set", tmp_path / "out")
    (tmp_path / "pictures").mkdir()
    train = tmp_path / "set" / "train-00000-of-00001.parquet"
    assert "is no Parquet file" in refused("data", "pack", train, tmp_path / "pictures", tmp_path / "out")
    assert "takes one source" in refused("data", "pack", tmp_path / "pictures", tmp_path / "other", tmp_path / "out")
    assert "exists already" in refused("data", "pack", train, tmp_path / "set")
