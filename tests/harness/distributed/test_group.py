"""Who am I among the ranks, by whatever started me."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aimscale.harness.distributed.group import (
    Group,
    LaunchError,
    Placement,
    choose_device,
    find_placement,
    gpu_index,
    start_group,
)
from aimscale.harness.probe.features.backbones import matmul_precision
from aimscale.harness.probe.run import standalone_group
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One card, to be chosen and not to be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def cores_of(group: Group, are_bound: bool) -> int:
    """Count cores on a machine of 24, to all of which, or to 12 each, two ranks are bound."""
    first = 12 * group.rank if are_bound else 0
    os.sched_getaffinity = lambda pid: set(range(first, first + (12 if are_bound else 24)))  # type: ignore[assignment]
    os.environ["AIMSCALE_HOST_SHARE"] = "1"
    whole = group.cores()
    os.environ["AIMSCALE_HOST_SHARE"] = "0.5"
    assert group.cores() == whole // 2
    return whole


@pytest.mark.parametrize("are_bound", [False, True])
def test_ranks_divide_the_cores_that_they_share(in_group: Callable[..., list[int]], are_bound: bool) -> None:
    assert in_group(cores_of, are_bound, world_size=2) == [12, 12]


def test_alone_torchrun_and_slurm_end_in_the_same_placement() -> None:
    alone = find_placement({})
    assert (alone.rank, alone.world_size, alone.local_rank, alone.address) == (0, 1, 0, "127.0.0.1")

    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    placed = find_placement(torchrun)
    assert (placed.rank, placed.world_size, placed.local_rank, placed.address, placed.port) == (3, 4, 1, "node1", 1234)

    slurm = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[003-004,9]",
    }  # fmt: skip
    placed = find_placement(slurm)
    assert (placed.rank, placed.world_size, placed.local_rank, placed.address) == (5, 8, 1, "gpu003")
    assert placed.port == find_placement(slurm | {"SLURM_PROCID": "0"}).port != alone.port
    for nodes, first in (
        ("n1,n2", "n1"),
        ("gpu[07-12]", "gpu07"),
        ("a-[1,3]-ib", "a-1-ib"),
        ("r[2-3],other", "r2"),
        ("r[1-2]i[0-1]n[03,5],other", "r1i0n03"),
    ):
        assert find_placement(slurm | {"SLURM_JOB_NODELIST": nodes}).address == first
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "9"}
    assert find_placement(batch_script).world_size == 1, "only what srun started is one of several"


def test_ranks_of_one_host_meet_on_loopback() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    for name, number, is_local in (("LOCAL_WORLD_SIZE", "4", True), ("LOCAL_WORLD_SIZE", "2", False)):
        assert find_placement(torchrun | {name: number}).address == ("127.0.0.1" if is_local else "node1")
    for number, address in (("1", "127.0.0.1"), ("2", "n1")):
        assert find_placement(slurm | {"SLURM_STEP_NUM_NODES": number}).address == address


def listening(group: Group) -> list[str]:
    """Addresses, in hexadecimal digits, at which this process listens."""
    links = [each.readlink().name for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in links]


def test_ranks_of_one_host_listen_on_loopback_alone(in_group: Callable[..., list[list[str]]]) -> None:
    first, second = in_group(listening, world_size=2)
    assert first
    assert {*first, *second} == {"0100007F"}


def limit_without_a_warning(group: Group) -> None:
    with warnings.catch_warnings(action="error"):
        group.limit_collectives(60.0)


def test_limits_of_exchanges_are_set_by_a_name_that_this_torch_does_not_warn_about(
    in_group: Callable[..., list[None]],
) -> None:
    in_group(limit_without_a_warning, world_size=2)


def test_a_task_that_sees_one_card_of_its_own_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm may bind a card to each task; under torchrun every rank sees all cards, or there are too few."""
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    placed = find_placement(slurm | {"SLURM_LOCALID": "1"})
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert (gpu_index(placed, 1), gpu_index(placed, 8)) == (0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="1"):
        gpu_index(placed, 1)


def test_a_process_alone_multiplies_on_its_card_as_ranks_do(
    card: None, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    """Else the accuracies of a run would depend on who measures them."""
    with standalone_group(RunDir.create(tmp_path / "run", tiny_config()), "auto") as group:
        assert group.device == torch.device("cuda", 0)
        assert torch.get_float32_matmul_precision() == "high"
        for precision, expected in (("fp32", "highest"), ("bf16", "high")):
            with matmul_precision(precision):
                # what torch.compile asks; it raises where one name was set by allow_tf32 and the other was not
                assert torch.get_float32_matmul_precision() == expected
                assert torch.backends.cuda.matmul.allow_tf32 == (expected == "high")
        assert torch.get_float32_matmul_precision() == "high"


def test_deepspeed_is_told_the_card_and_not_the_number_of_the_task(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the card of LOCAL_RANK; a task that Slurm gave one card of its own has card 0, whichever task it is."""
    monkeypatch.setattr(os, "environ", os.environ | {"SLURM_LOCALID": "3"})
    for name in ("TORCHELASTIC_RUN_ID", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    placement = Placement(rank=7, world_size=8, local_rank=3, address="n1", port=1)
    assert start_group(placement, "cuda").device == torch.device("cuda", 0)
    assert (os.environ["LOCAL_RANK"], os.environ["RANK"]) == ("0", "7")
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:512"
    start_group(placement, "cuda")
    group = start_group(placement, "cpu")
    assert os.environ["LOCAL_RANK"] == "3"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "the user's own settings stand"
    assert group.ranks_per_node == 8, "nothing says otherwise"
    os.environ["SLURM_STEP_TASKS_PER_NODE"] = "2(x3),1"
    assert group.ranks_per_node == 2
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    assert group.ranks_per_node == 4


def test_a_card_that_is_not_there_and_half_an_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="CUDA"):
        choose_device(find_placement({}), "cuda")
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        find_placement({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST is not set"):
        find_placement({"SLURM_STEP_NUM_TASKS": "2"})


def _collect_beside_a_group(rank: int, folder: Path) -> None:
    group = torch.distributed.ProcessGroupGloo(torch.distributed.FileStore(str(folder / "fork"), 1), rank, 1)
    gc.collect()
    del group


def test_a_fork_collects_no_group_that_its_parent_left(in_processes: Callable[..., list[int]], tmp_path: Path) -> None:
    in_processes(_collect_beside_a_group, tmp_path)  # the first imports, and freezes what it finds
    garbage: list[object] = [
        torch.distributed.ProcessGroupGloo(torch.distributed.FileStore(str(tmp_path / "store"), 1), 0, 1)
    ]
    garbage.append(garbage)
    gc.disable()
    try:
        del garbage
        assert in_processes(_collect_beside_a_group, tmp_path) == [0]
    finally:
        gc.enable()
