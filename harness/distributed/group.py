"""The process group of a run: this rank's place in it, how long ranks wait for each other, and what they exchange."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch

from aimscale.aim.errors import UserError
from aimscale.harness.device.memory import free_host_bytes, keep_freed_memory
from aimscale.harness.distributed.meeting import (
    LOOPBACK,
    LaunchError,
    Placement,
    find_interface,
    gpu_index,
    naming_the_interface,
    open_store,
    slurm_placement,
)
from aimscale.harness.run.timeouts import (
    COLLECTIVE_TIMEOUT_S,
    PHASE_TIMEOUT_S,
    RENDEZVOUS_TIMEOUT_S,
    STEP_FACTOR,
    STEP_TIMEOUT_S,
)

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

WRITTEN_BYTES_PER_S = 20e6
"""Rate at which a rank writes at least: 128 of them on a file server of 2.5 GB/s, bytes/s."""


def find_placement(environment: dict[str, str] | None = None) -> Placement:
    """Read torchrun's variables, else those of a Slurm step with several tasks, else assume a single process."""
    env = dict(os.environ) if environment is None else environment
    try:
        if "RANK" in env or "WORLD_SIZE" in env:
            is_local = env["WORLD_SIZE"] == env.get("LOCAL_WORLD_SIZE")
            return Placement(
                rank=int(env["RANK"]),
                world_size=int(env["WORLD_SIZE"]),
                local_rank=int(env.get("LOCAL_RANK", "0")),
                address=LOOPBACK if is_local else env["MASTER_ADDR"],
                port=int(env["MASTER_PORT"]),
            )
        # Only steps of srun have this variable: a batch script itself is a single process, whatever its job has.
        if (num_tasks := int(env.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
            return slurm_placement(env, num_tasks)
        return Placement(rank=0, world_size=1, local_rank=0, address=LOOPBACK, port=0)
    except KeyError as error:
        raise LaunchError(
            f"this process is to be one of several ranks, but {error.args[0]} is not set; start with torchrun or srun, "
            "or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS to run alone"
        ) from error


def step_timeout_s(longest_s: float) -> float:
    """Return how long ranks wait for each other in a step if the longest so far took this long (0: none), s."""
    return max(STEP_TIMEOUT_S, STEP_FACTOR * longest_s) if longest_s else COLLECTIVE_TIMEOUT_S


def write_timeout_s(num_bytes: float) -> float:
    """Return how long ranks wait for one that writes, s."""
    return max(PHASE_TIMEOUT_S, num_bytes / WRITTEN_BYTES_PER_S)


class PeerFailedError(RuntimeError):
    """Failure of another rank that is no user's mistake."""


class Group:
    """Process group of a run: the device of this rank, and exchanges of small host values, which cost nothing with one
    rank."""

    def __init__(self, placement: Placement, device: torch.device, host_group: Any) -> None:
        self.rank = placement.rank
        self.is_first = self.rank == 0
        """Whether this rank writes the run's files."""
        self.world_size = placement.world_size
        self.device = device
        self._host_group = host_group

    def memory_bytes(self) -> int:
        """Return the memory that this rank may plan for: its GPU's, or its share of the host's free memory."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return self.host_memory_bytes()

    def host_memory_bytes(self) -> int:
        """Return this rank's share of its host's free memory."""
        return int(_host_share() * free_host_bytes()) // self.ranks_per_node

    def min_over_ranks(self, number: int) -> int:
        """Return the minimum of a number over ranks, so that all decide alike."""
        return int(min(self.all_gather_object(number)))

    @property
    def ranks_per_node(self) -> int:
        """Ranks on a host, as torchrun or Slurm's step says, such as `8(x15),4`; all ranks if neither does."""
        said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        number = re.match(r"\d+", said)
        return min(self.world_size, int(number[0])) if number else self.world_size

    def cores(self) -> int:
        """Count this rank's cores: those that it may run on, divided among the ranks that may run on the same."""
        mine = os.uname().nodename, sorted(os.sched_getaffinity(0))
        return max(1, int(_host_share() * len(mine[1])) // self.all_gather_object(mine).count(mine))

    def any(self, flag: bool) -> bool:
        """Return whether any rank raised its flag."""
        return self.sum_counts(int(flag))[0] > 0

    def sum_counts(self, *counts: int) -> list[int]:
        """Sum each count over ranks, in one exchange on the host, not on the device."""
        values = torch.tensor(counts, dtype=torch.int64)
        if self.world_size > 1:
            torch.distributed.all_reduce(values, group=self._host_group)
        return values.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor on the device over ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather tensors on the device, of one shape on every rank, along a new first axis, in order of ranks."""
        if self.world_size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def all_to_all(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send a flat tensor on the device to each rank, and return those that the ranks send here, of these sizes."""
        if self.world_size == 1:
            return list(parts)
        received = parts[0].new_empty(sum(sizes))
        sent = [len(part) for part in parts]
        torch.distributed.all_to_all_single(received, torch.cat(list(parts)), list(sizes), sent)
        return list(received.split(list(sizes)))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather every rank's picklable value on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, value: T, rank: int) -> T:
        """Return one rank's picklable value on every rank."""
        box = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=rank, group=self._host_group)
        return box[0]

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its (picklable) result on every rank.

        Raises:
            UserError: raised on rank 0, then on every rank; any other exception is a RuntimeError on the other ranks.
        """
        if self.world_size == 1:
            return make()
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as caught:
                error = caught
                outcome[1] = caught if isinstance(caught, UserError) else RuntimeError(f"rank 0 failed: {caught!r}")
        torch.distributed.broadcast_object_list(outcome, src=0, group=self._host_group)
        value, failure = outcome
        if failure is not None:
            raise error or tag_failed_rank(0, failure)
        return cast(T, value)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run an action that may fail on some ranks on every rank; if it fails on any, all raise.

        Raises:
            Exception: this rank's own failure, or else what another rank raised: a UserError of the same class, or a
                PeerFailedError.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            self.raise_on_all_ranks(error)
        return result

    def raise_on_all_ranks(self, error: Exception | None) -> NoReturn:
        """Raise this rank's error, or else the first other rank's."""
        kind = type(error) if isinstance(error, UserError) else type(error).__name__
        reports = self.all_gather_object(None if error is None else (kind, str(error)))
        if error is not None:
            raise error
        rank = next(rank for rank, report in enumerate(reports) if report is not None)
        kind, sentence = reports[rank]
        if isinstance(kind, str):
            raise PeerFailedError(f"rank {rank} failed: {kind}: {sentence}")
        raise tag_failed_rank(rank, kind(sentence))

    @contextlib.contextmanager
    def collective_timeout(self, seconds: float) -> Iterator[None]:
        """Limit the time of exchanges that the block begins; see `limit_collectives`."""
        self.limit_collectives(seconds)
        try:
            yield
        finally:
            self.limit_collectives(COLLECTIVE_TIMEOUT_S)

    def limit_collectives(self, seconds: float) -> None:
        """Limit the time of exchanges that begin from now on: a rank for which the others wait longer is gone."""
        c10d = torch.distributed.distributed_c10d
        set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # torch 2.15 renamed it
        # DeepSpeed has groups of its own.
        for group in list(c10d._world.pg_map) if self.world_size > 1 else ():
            set_timeout(datetime.timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self._host_group)


def _host_share() -> float:
    """Return the share of its host that a run may plan for, which a launcher of several runs sets."""
    return float(os.environ.get("AIMSCALE_HOST_SHARE", "1"))


def tag_failed_rank(rank: int, error: E) -> E:
    """Mark an error that this rank raises because another met it."""
    error.failed_rank = rank  # type: ignore[attr-defined]
    return error


ALONE = Group(Placement(rank=0, world_size=1, local_rank=0, address="", port=0), torch.device("cpu"), None)
"""Group of a process that works by itself, on the CPU."""


def choose_device(placement: Placement, name: str) -> torch.device:
    """Choose the device that `name` (auto, cpu or cuda) means for this process, and make it the current one."""
    if name == "auto":
        name = os.environ.get("AIMSCALE_DEVICE", name)
    keep_freed_memory()
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise LaunchError("the device cuda was asked for but torch sees no CUDA device; use cpu or auto")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # read when the first tensor is allocated
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", gpu_index(placement, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # tensor cores (TF32)
    return device


def start_group(placement: Placement, device_name: str) -> Group:
    """Choose the device, tell DeepSpeed about it, and join the process group."""
    device = choose_device(placement, device_name)
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank if device.index is None else device.index),  # DeepSpeed takes that GPU
        MASTER_ADDR=placement.address,
        MASTER_PORT=str(placement.port),
    )
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    group = Group(placement, device, _meet(placement, device))
    group.limit_collectives(COLLECTIVE_TIMEOUT_S)
    return group


def _meet(placement: Placement, device: torch.device) -> Any:
    """Join the process group of the ranks and return a group for values on the host, None without other ranks.

    Host values travel over gloo, so that asking "shall we stop?" never waits for the device.

    Raises:
        LaunchError: ranks on several hosts did not meet within `RENDEZVOUS_TIMEOUT_S`.
    """
    address, rank, world_size, is_gpu = placement.address, placement.rank, placement.world_size, device.type == "cuda"
    is_alone, is_one_host = world_size == 1, world_size == 1 or address == LOOPBACK
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S if is_one_host else RENDEZVOUS_TIMEOUT_S)
    gloo_timeout = timeout if is_one_host else timeout / 5  # gloo waits five times as long for a connection
    with contextlib.nullcontext() if is_one_host else naming_the_interface(address, placement.port, rank):
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore() if is_alone else open_store(placement, timeout)
            if "GLOO_SOCKET_IFNAME" not in os.environ:  # on one host, do not listen on a network
                name = "lo" if is_one_host else find_interface(address, store, rank, world_size)
                os.environ["GLOO_SOCKET_IFNAME"] = name
            torch.distributed.init_process_group(
                "nccl" if is_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout if is_gpu else gloo_timeout,
                device_id=device if is_gpu else None,
            )
        return None if is_alone else torch.distributed.new_group(backend="gloo", timeout=gloo_timeout)


def import_deepspeed() -> Any:
    """Import DeepSpeed without its trial compilations, and with its log level at warnings."""
    import deepspeed
    from deepspeed.utils import logger

    # It would test the compiler for each of its C++ operators, and build a communicator (25 s); none is used.
    deepspeed.ops.__compatible_ops__ = {}
    # It calls collectives by names that new versions of torch warn about.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    logger.setLevel(logging.WARNING)
    return deepspeed


def stop_group() -> None:
    """Destroy the process group, so that another run may start here and gloo's threads abort no exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "deepspeed" in sys.modules:
        # DeepSpeed remembers the group that it saw first, in two places.
        sys.modules["deepspeed"].comm.comm.cdb = None
        sys.modules["deepspeed"].utils.groups._WORLD_GROUP = None
