"""A tiny run on packed images, and training processes that cost no start-up: forks of the test process."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import smooth
from trainers import free_port

import aimscale.harness.device.speed
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.listing import list_folder
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.distributed.group import find_placement, import_deepspeed, start_group, stop_group
from aimscale.harness.run.config import RunConfig, RuntimeConfig, parse, run_config


@pytest.fixture(autouse=True, scope="session")
def _small_peak() -> Iterator[None]:
    """Measure the peak on a small product; forks inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aimscale.harness.device.speed, "GEMM_SIDE", {"cpu": 128, "cuda": 1024})
        yield


def write_pictures(folder: Path, number: int, seed: int) -> None:
    """Smooth random pictures of 16 px."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(number):
        smooth(rng, 16, 16, coarse=4).save(folder / f"{index}.png")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` (64 images), `validation` (16) and, with two classes, `two` and `other` (24), all of 16 px."""
    root = tmp_path_factory.mktemp("tiny")
    for name, seeds in (("two", (2, 3)), ("other", (4, 5))):
        for label, seed in zip(("left", "right"), seeds, strict=True):
            write_pictures(root / "images" / name / label, 12, seed)
        pack_images(list_folder(root / "images" / name), root / name)
    for name, number, seed in (("train", 64, 0), ("validation", 16, 1)):
        write_pictures(root / "images" / name, number, seed)
        pack_images(list_folder(root / "images" / name), root / name)
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path) -> Callable[..., RunConfig]:
    """A run of a 2-block model on 16 tokens; keyword arguments replace sections of a run."""

    def make(runtime: dict[str, Any] | None = None, **result: Any) -> RunConfig:
        values = {
            "model": {"size": "w16-d2", "image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": str(tiny_data / "train")}]},
            "optimiser": {"batch_size": 8, "precision": "fp32"},
            "schedule": {"warmup_images": 16},
            "budgets": [64, 128],
            "validation": {"path": str(tiny_data / "validation"), "num_prefixes": 2, "centre_crop": 1.0},
            **result,
        }
        defaults = {"checkpoint_every_images": 24, "log_every_steps": 3}
        return run_config(values, "the test", parse(RuntimeConfig, {**defaults, **(runtime or {})}, "the test"))

    return make


@pytest.fixture(scope="session")
def spoil() -> Callable[..., Path]:
    """Copy a data set: its index stays, and the given samples hold zeros."""

    def spoilt(folder: Path, out: Path, samples: Iterable[int]) -> Path:
        shutil.copytree(folder, out)
        for name, offset, size in open_dataset(out).byte_ranges([*samples]):
            with (out / name).open("r+b") as shard:
                shard.seek(offset)
                shard.write(bytes(size))
        return out

    return spoilt


@pytest.fixture(scope="session")
def in_processes() -> Callable[..., list[int]]:
    """`run_in_processes`."""
    return run_in_processes


HANG_S = 300
"""A rank that takes longer has hung: before pytest's own limit, which would not tell where, s."""


def run_in_processes(function: Callable[..., None], *args: Any, world_size: int = 1) -> list[int]:
    """Run `function(rank, *args)` in forks that form one group; returns their exit codes (-9: killed)."""
    _import_for_forks()
    context = multiprocessing.get_context("fork")
    port = free_port()

    def child(rank: int) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True)  # a rank that hangs tells where
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        function(rank, *args)

    # A group that nobody holds ends here, where its threads are: in a fork, its end would wait for what runs on their
    # stacks by then.
    gc.collect()
    children = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    return [process.exitcode or 0 for process in children]


@pytest.fixture(scope="session")
def in_group(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Call `function(group, *args)` on every rank of a process group; returns what each of them gives."""

    def run(function: Callable[..., Any], *args: Any, world_size: int = 1) -> list[Any]:
        folder = tmp_path_factory.mktemp("group")
        assert run_in_processes(_call_in_group, function, args, folder, world_size=world_size) == [0] * world_size
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world_size)]

    return run


def _call_in_group(rank: int, function: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    found = function(group, *args)
    stop_group()
    (folder / str(rank)).write_bytes(pickle.dumps(found))


@functools.cache
def _import_for_forks() -> None:
    """Import what every fork would (DeepSpeed's ZeRO decorates a function with `torch.compile`: seconds a rank)."""
    import_deepspeed()
    importlib.import_module("torch._inductor.compile_fx")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all of it
    atexit.register(gc.unfreeze)  # or nanobind reports the rest as leaked
