"""Damaged files: one sentence that names the file, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused, say
from pictures import saved
from PIL import Image

from aimscale.harness.data import DataError
from aimscale.harness.data.images import UndecodableImageError, decode
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.data.store.listing import list_folder
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.data.store.tars import expand_braces
from aimscale.harness.data.stream.stream import open_stream
from aimscale.harness.run.config import RunConfig

END = bytes(2 * tarfile.BLOCKSIZE)


PNG = saved(Image.new("RGB", (8, 8)))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def member(name: str, data: bytes = b"", *, kind: bytes = b"0", size: int | None = None) -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, len(data) if size is None else size
    return header.tobuf(tarfile.GNU_FORMAT) + padded(data)


TARS: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a tar file" * 100,
    "cut in a member": member("0.png", PNG, size=5000),
    "cut between members": member("0.png", PNG) * 2,
    "a header is damaged": member("0.png", PNG) + b"\1" * 512 + member("1.png", PNG) + END,
}


@pytest.mark.parametrize("damage", TARS)
def test_a_damaged_tar_is_refused_with_and_without_an_index(
    damage: str, tmp_path: Path, configure: Callable[..., RunConfig]
) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(TARS[damage])
    assert str(shard) in refused("data", "index", tmp_path)
    assert [*tmp_path.iterdir()] == [shard]
    if b"0.png" not in TARS[damage]:  # else there is an image to train on
        with pytest.raises(DataError, match=str(shard)):
            open_stream(configure(path=f"wds://{shard}")).batch(range(4))


def test_braces_stand_for_names() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b{0..1}}::c") == ["a", "b0", "b1", "c"]
    with pytest.raises(DataError, match=r"[{]"):
        expand_braces("{a,b")


@pytest.mark.parametrize("url", ["nosuch://x", "http://[", "file:///none", "s3://x"])
def test_urls_that_nothing_can_use_are_one_sentence(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimscale.harness.data.store.shards.FIRST_PAUSE_S", 0.0)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for arguments in (["info", url], ["index", url, "--out", tmp_path], ["index", f"{url}/a.tar", "--out", tmp_path]):
        said = refused("data", *arguments)
        assert url in said
        assert ("aimscale[s3]" in said) == url.startswith("s3:")
    assert not [*tmp_path.iterdir()]


WRONG = ({"version": 99}, {"version": None}, {"num_samples": None, "more": 1}, {"fingerprint": "another"})


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_damaged_dataset_json_is_refused(wrong: dict[str, Any], small_set: Path, tmp_path: Path) -> None:
    shutil.copytree(small_set, tmp_path / "set")
    path = tmp_path / "set" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(DataError, match="data index"):
        open_dataset(tmp_path / "set")
    for text in (b"", b"[]", b"{}", b"null", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"dataset\.json"):
            open_dataset(tmp_path / "set")
        assert fingerprint(str(tmp_path / "set")) is None


@pytest.mark.parametrize("name", ["samples", "checksum", "label", "shards", "bad", "bad_before"])
def test_a_damaged_index_is_refused(name: str, small_set: Path, tmp_path: Path) -> None:
    (folder,) = small_set.glob("index-*")
    data = (folder / f"{name}.npy").read_bytes()
    for number, damaged in enumerate([b"", data[:100], data[:-3] or b"x", PNG]):
        copy = tmp_path / str(number)
        shutil.copytree(small_set, copy)
        (copy / folder.name / f"{name}.npy").write_bytes(damaged)
        with pytest.raises(DataError, match="data index"):
            open_dataset(copy)


_DECODING = """
import sys
import numpy as np
from pictures import damaged, of_every_format
from aimscale.harness.data.images import UndecodableImageError, decode

rng, found = np.random.default_rng(0), set()
for data in of_every_format(rng).values():
    for _ in range(25):
        try:
            found.add(decode(damaged(rng, data)).shape[0])
        except UndecodableImageError as error:
            found.add(bool(str(error)))
assert found == {3, True}, found
assert "torchvision" not in sys.modules, "the PNG decoder of 0.29.2 ends the process"
"""


def test_no_byte_of_a_picture_ends_a_process() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", _DECODING], check=True, env=environment)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_a_moving_picture_one_frame_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.new("RGB", (400, 300), (number, 0, 0)) for number in range(40)]
    data = saved(pictures[0], kind, save_all=True, append_images=pictures[1:])
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", None)
    assert decode(data).shape == (3, 300, 400)
    assert decode(data).max() <= 3


def claiming(kind: str, side: int, **options: Any) -> bytes:
    """A small file whose header says that it is side x side pixels."""
    data = saved(Image.effect_noise((40, 40), 90).convert("RGB"), kind, **options)
    if kind == "png":
        return data[:16] + struct.pack(">II", side, side) + data[24:]
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:start] + struct.pack(">HH", side, side) + data[start + 4 :]


@pytest.mark.parametrize("side", [9000, 65_500])
@pytest.mark.parametrize(("kind", "options"), [("jpeg", {}), ("jpeg", {"progressive": True}), ("png", {})])
def test_a_header_that_claims_what_is_not_there_is_refused(side: int, kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(UndecodableImageError):
        decode(claiming(kind, side, **options))


def test_only_formats_that_the_page_names_and_eight_bits_are_read() -> None:
    for kind in ("eps", "ico", "icns", "pcx", "sgi", "jpeg2000", "tga"):
        with pytest.raises(UndecodableImageError):
            decode(saved(Image.new("RGB", (32, 32)), kind))
    grey = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    for values, kind in ((grey, "png"), (grey, "ppm"), (grey, "tiff"), (grey.astype(np.float32), "tiff")):
        with pytest.raises(UndecodableImageError, match="8 bits"):
            decode(saved(Image.fromarray(values), kind))


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "tiff"])
def test_transparent_pixels_are_white_and_counted(kind: str, tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 4), dtype=np.uint8)
    pixels[:3] = (200, 10, 30, 255)
    options = {"lossless": True} if kind == "webp" else {}
    data = saved(Image.fromarray(pixels), kind, **options)
    image = decode(data)
    assert (image[:, 3:] == 255).all()
    assert image[:, 0, 0].tolist() == [200, 10, 30]
    assert decode(data, channels=1)[0, 5, 5] == 255
    half = Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 128), dtype=np.uint8))
    assert decode(saved(half, "png"))[:, 0, 0].tolist() == [127] * 3
    opaque = Image.fromarray(np.concatenate([pixels[:3], pixels[:3]]))
    assert (decode(saved(opaque, kind, **options)) == torch.tensor([200, 10, 30])[:, None, None]).all()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{kind}").write_bytes(data)
    (tmp_path / "in" / f"b.{kind}").write_bytes(saved(opaque, kind, **options))
    assert say("data", "pack", tmp_path / "in", tmp_path / "out").startswith("1 image has transparent pixels")
    assert (open_dataset(tmp_path / "out").read(0) == data) or (open_dataset(tmp_path / "out").read(1) == data)


def test_names_that_are_no_text_are_kept_apart(tmp_path: Path) -> None:
    for name in ("\udce9", "\udcff"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / name / f"{name}.png")
    info = pack_images(list_folder(tmp_path / "in"), tmp_path / "out").info
    assert len(set(info.classes or ())) == 2
    (tmp_path / "out" / "shard-000000.tar").rename(tmp_path / "out" / "\udce9.tar")
    again = index_shards(str(tmp_path / "out"), tmp_path / "out", classes=info.classes)
    assert again.fingerprint == info.fingerprint
    assert open_dataset(tmp_path / "out").decode(1).shape == (3, 8, 8)


def test_damaged_pictures_are_left_out_of_a_pack_and_named_with_their_reasons(tmp_path: Path) -> None:
    data = bytearray(saved(Image.effect_noise((40, 40), 90).convert("RGB")))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(data)
    data[len(data) // 2] ^= 4
    (tmp_path / "in" / "flipped.png").write_bytes(data)
    assert "flipped.png cannot be decoded (" in refused("data", "pack", tmp_path / "in", tmp_path / "out")
    said = say("data", "pack", tmp_path / "in", tmp_path / "out", "--skip-bad")
    assert re.search(r"left out.*flipped\.png \(.+\)", said)
    assert len(open_dataset(tmp_path / "out")) == 1


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PNG)
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert "b.png" in refused("data", "pack", tmp_path / "in", tmp_path / "out")


def idx(shape: tuple[int, ...], num_bytes: int, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + bytes(num_bytes)


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # test processes name the cases alike


GZIP = zipped(idx((5, 4, 4), 80))


@pytest.mark.parametrize(
    "images",
    [
        *(b"not compressed", GZIP[:20], zipped(b"\0\0\x08\xff" + bytes(2000)), zipped(idx((5, 2, 2), 80, kind=12))),
        *(zipped(idx(shape, size)) for shape, size in (((5, 4, 4), 75), ((0, 4, 4), 0), ((80,), 80), ((4, 4, 4), 64))),
    ],
)
def test_a_damaged_idx_file_is_refused(images: bytes, tmp_path: Path) -> None:
    source, labels = tmp_path / "t-images-idx3-ubyte.gz", tmp_path / "t-labels-idx1-ubyte.gz"
    source.write_bytes(images)
    labels.write_bytes(zipped(idx((5,), 5)))
    assert str(source) in refused("data", "pack", source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [source, labels]
    labels.unlink()
    source.write_bytes(GZIP)
    assert str(labels) in refused("data", "pack", source, tmp_path / "out")


BENCHMARK_FILES: list[tuple[str, dict[str, bytes]]] = [
    ("pets", {"oxford-iiit-pet/annotations/trainval.txt": b"a_1 1 1 1\n\n"}),
    ("cars", {"stanford_cars/devkit/cars_train_annos.mat": b"\xff" * 999}),
    ("imagenet-1k", {"train/a.JPEG": PNG}),
    ("cifar10", {"cifar-10-batches-py/data_batch_1": b"no pickle"}),
    ("pcam", {"camelyonpatch_level_2_split_train_x.h5": b"\x89HDF\r\n\x1a\n" + bytes(99)}),
]


@pytest.mark.parametrize("case", range(len(BENCHMARK_FILES)))
def test_a_damaged_benchmark_is_refused(case: int, tmp_path: Path) -> None:
    name, files = BENCHMARK_FILES[case]
    for path, content in files.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(content)
    said = refused("data", "pack", tmp_path / "in", tmp_path / "out", "--benchmark", name, "--split", "train")
    assert str(tmp_path / "in") in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
