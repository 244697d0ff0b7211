from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from commands import refused, say
from pictures import saved
from PIL import Image

from aimscale.aim.errors import UserError
from aimscale.harness.data import DataError
from aimscale.harness.data.images import crop_centre, decode
from aimscale.harness.data.store import bundled, pack, processes
from aimscale.harness.data.store.dataset_info import read_info
from aimscale.harness.data.store.index import COLUMNS, open_dataset
from aimscale.harness.data.store.listing import list_folder
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.run.failures import NoMemoryError, StandstillError


def test_pack_keeps_bytes_and_labels_and_webdataset_reads_them(small_set: Path) -> None:
    dataset = open_dataset(small_set)
    assert len(dataset) == 60
    assert len(dataset.index.shards) > 1
    assert dataset.classes == ("ant", "bee", "cat")
    originals = {
        path.read_bytes(): label
        for label, name in enumerate(dataset.classes)
        for path in (small_set.parent / "images" / name).iterdir()
    }
    labels = dataset.require_labels()
    assert {dataset.read(i): labels[i] for i in range(60)} == originals
    assert len(set(labels[:12].tolist())) == 3, "the first samples are not a random subset"
    assert dataset.decode(5).shape == (3, 32, 32)
    shards = [str(small_set / name) for name in dataset.index.shard_sizes]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [dataset.key(i) for i in range(60)]
    assert [sample["png"] for sample in samples] == dataset.read_many(range(60))
    repeat = pack_images(list_folder(small_set.parent / "images"), small_set.parent / "again")[0]
    assert repeat.fingerprint == dataset.fingerprint


def test_a_path_that_is_no_data_set_names_the_nearest(small_set: Path) -> None:
    with pytest.raises(DataError, match=f"did you mean {small_set}\\?"):
        read_info(f"{small_set}s")
    with pytest.raises(DataError, match=f"name one of them: .*{small_set}"):
        read_info(str(small_set.parent))


def test_the_mapped_columns_equal_the_table(small_set: Path) -> None:
    dataset = open_dataset(small_set)
    table = pq.read_table(small_set / "index.parquet")
    for name in COLUMNS["samples"].names or ():
        assert (dataset.index.samples[name] == table[name].to_numpy()).all()
    assert (dataset.index.checksum == table["checksum"].to_numpy()).all()
    assert dataset.require_labels().tolist() == table["label"].to_pylist()
    assert [dataset.shard_of(i) for i in range(60)] == table["shard"].to_pylist()
    assert [dataset.key(i) for i in (0, 59)] == [table["key"][i].as_py() for i in (0, 59)]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read(17) == dataset.read(17)
    assert len(pickle.dumps(dataset)) < 10_000, "a mapped column was pickled by its content"


def test_any_number_of_processes_writes_the_same_bytes(small_set: Path, tmp_path: Path) -> None:
    source = small_set.parent / "images"
    (tmp_path / "one").mkdir()
    for where, workers in ((tmp_path / "one" / "packed", 1), (tmp_path / "packed", 3)):
        pack_images(list_folder(source), where, max_shard_bytes=30_000, num_workers=workers)
    one, many = (
        {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one" / "packed", tmp_path / "packed")
    )
    assert one == many
    assert open_dataset(tmp_path / "packed").info.num_shards >= 4


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGKILL, NoMemoryError), (signal.SIGSTOP, StandstillError)], ids=str
)
def test_a_process_that_is_killed_or_stopped_ends_a_pack_with_a_sentence_and_leaves_nothing(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, kind: type[UserError]
) -> None:
    monkeypatch.setattr(pack, "_CHUNK", 1)
    monkeypatch.setattr(processes, "POLL_S", 0.1)
    monkeypatch.setattr(processes, "STOPPED_S", 0.5)
    seen = set[int]()

    def progress(what: str, done: int, total: int, unit: str) -> None:
        for process in multiprocessing.active_children() if done == 5 else ():
            seen.add(process.pid or 0)
            os.kill(process.pid or 0, signum)

    with pytest.raises(kind, match=r"killed|was stopped by a signal"):
        pack_images(list_folder(small_set.parent / "images"), tmp_path / "out", num_workers=2, progress=progress)
    assert len(seen) == 2
    assert not multiprocessing.active_children()
    assert not [*tmp_path.iterdir()]


def test_ranges_are_disjoint_splits_of_the_whole(small_set: Path, tmp_path: Path) -> None:
    source, whole = small_set.parent / "images", open_dataset(small_set)
    parts = []
    for bounds in ("0:45", "75%:100%"):
        say("data", "pack", source, tmp_path / bounds, "--images", bounds)
        parts.append(open_dataset(tmp_path / bounds))
    read = [dataset.read(i) for dataset in parts for i in range(len(dataset))]
    assert read == [whole.read(i) for i in range(60)]
    assert parts[1].classes == whole.classes
    for option, bad, why in (
        *(("--images", bad, "0:60") for bad in ("50:61", "5:5", "50%:120%")),
        *(("--images", bad, "START:STOP") for bad in ("5", "a%:5")),
        *(("--split", bad, "add up") for bad in ("80/10", "80/10/20", "train", "-10/10/100")),
    ):
        assert why in refused("data", "pack", source, tmp_path / "bad", option, bad)
    assert not (tmp_path / "bad").exists()


def test_a_split_keeps_equal_images_together_and_deals_every_class(tmp_path: Path) -> None:
    rng, source, out = np.random.default_rng(0), tmp_path / "images", tmp_path / "my shards"
    numbers = {"many": 120, "few": 30, "one": 1}
    for name, number in numbers.items():
        (source / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(source / name / f"{i}.png")
    for i in range(0, 120, 5):  # copies of other names, one in another class
        copy = source / ("few" if i == 0 else "many") / f"copy-{i}.png"
        copy.write_bytes((source / "many" / f"{i}.png").read_bytes())
    (source / "drawings").mkdir()
    for i in range(3):
        (source / "drawings" / f"{i}.SVG").write_text("<svg/>")
    said = say("data", "pack", source, out, "--split", "70/20/10")
    parts = {name: open_dataset(out / name) for name in ("train", "validation", "test")}
    contents = {name: [part.read(i) for i in range(len(part))] for name, part in parts.items()}
    assert sorted(itertools.chain(*contents.values())) == sorted(path.read_bytes() for path in source.rglob("*.png"))
    together = [set(each) for each in contents.values()]
    assert not any(one & other for one, other in itertools.combinations(together, 2))
    for name, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        counts = np.bincount(parts[name].require_labels(), minlength=3)
        assert np.abs(counts - share * np.array([31, 143, 1])).max() <= 2
    assert "24 duplicates kept" in said
    assert "left out: 3 .svg" in said
    assert "hold no image: drawings\n" in said
    assert said.count("has no image of 1 of 3 classes: one") == 2
    last = shlex.split(said.splitlines()[-1])
    assert last == ["next:", "aimscale", "init", "my-shards.yaml", "--data", str(out), "--hours", "1"]
    assert "validation" not in say("data", "pack", source, tmp_path / "two", "--split", "90/0/10")
    assert "leave none for validation" in refused(
        "data", "pack", source / "one", tmp_path / "bad", "--split", "70/20/10"
    )


def test_pack_resizes_once(large_set: Path, tmp_path: Path) -> None:
    pack_images(list_folder(large_set.parent / "images"), tmp_path / "out", resize=64)
    dataset = open_dataset(tmp_path / "out")
    shorter = np.minimum(*dataset.sides(dataset.usable()))
    assert (shorter.min(), shorter.max()) == (40, 64)
    assert dataset.labels is None


def test_decode_reads_odd_formats() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for mode, kind in (("RGB", "bmp"), ("RGB", "tiff"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpeg"), ("L", "png")):
        data = saved(picture.convert(mode), kind)
        image = decode(data)
        assert image.shape == (3, 5, 7)
        if mode.startswith("RGB"):
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(pixels))
        assert decode(data, channels=1).shape == (1, 5, 7)


PNG = saved(Image.new("RGB", (8, 8)))
CUT_JPEG = saved(Image.effect_noise((64, 64), 90), "jpeg")[:900]
PACK = ["pack", "{}/in", "{}/out"]


@pytest.mark.parametrize(
    ("files", "arguments", "subject"),
    [
        ({"in/notes.txt": b"hello"}, PACK, "in "),
        ({}, PACK, "in "),
        ({"in/a.png": PNG, "in/cat/b.png": PNG}, PACK, "in "),
        ({"in/a.png": PNG, "in/b.jpg": CUT_JPEG}, PACK, "in/b.jpg"),
        ({"out/x": b""}, ["pack", "--bundled", "{}/out"], "out "),
        ({}, ["pack", "--bundled", "{}/out", "--resize", "9"], "out "),
        ({"in/notes.txt": b"hello"}, ["info", "{}/in"], "in "),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    files: dict[str, bytes], arguments: list[str], subject: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    assert f"{tmp_path}/{subject}" in refused("data", *(word.format(tmp_path) for word in arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_open_refuses_missing_truncated_and_unlabelled(small_set: Path, large_set: Path, tmp_path: Path) -> None:
    shutil.copytree(small_set, tmp_path / "copy")
    shard = tmp_path / "copy" / list(open_dataset(small_set).index.shard_sizes)[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=shard.name):
        open_dataset(tmp_path / "copy")
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        open_dataset(tmp_path / "copy")
    with pytest.raises(DataError, match=str(large_set)):
        open_dataset(large_set).require_labels()


def test_bundled_splits_share_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_CROPS", {"pretrain": 20, "train": 10, "validation": 4, "test": 3})
    bundled.write_bundled(tmp_path / "out")
    pretrain, train, validation, test = (open_dataset(tmp_path / "out" / name) for name in bundled.FOLDERS)
    checksums = [set(each.index.checksum) for each in (pretrain, validation, test)]
    assert not checksums[0] & checksums[1]
    assert not (checksums[0] | checksums[1]) & checksums[2]
    assert train.num_classes == 13
    assert (train.index.samples["width"] == 32).all()
    assert set(np.bincount(test.require_labels())) == {3}
    for name, image in bundled.photographs().items():
        regions = [bundled.region(image, split) for split in ("pretrain", "validation", "test")]
        assert torch.equal(torch.cat(regions, dim=2), image), name
        assert min(part.shape[-1] for part in regions) >= 32, name


def test_the_bundled_photographs_are_those_whose_licences_are_stated() -> None:
    stated = bundled.PHOTOGRAPHS.with_suffix(".md").read_text()
    rows = re.findall(r"^\| (\S+) \|.*\| (CC0|public domain) \| (\w{16}) \|$", stated, re.MULTILINE)
    with tarfile.open(bundled.PHOTOGRAPHS) as tar:
        found = {each.name: hashlib.sha256(tar.extractfile(each).read()).hexdigest()[:16] for each in tar}
    assert found == {name: digest for name, _, digest in rows}
    assert len(found) == 13
    assert bundled.PHOTOGRAPHS.stat().st_size < 4e6


def test_a_strip_is_cropped_before_it_is_enlarged() -> None:
    strip = torch.zeros(3, 1, 65_500, dtype=torch.uint8)
    strip[:, :, 32_740:32_760] = 200
    assert (crop_centre(strip[None], 16) == 200).all()
