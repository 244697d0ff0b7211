"""Where the ranks of a run meet: their places, the store by which they find each other, and the network of hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping

import psutil
import torch

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import EXIT_CRASHED

LOOPBACK = "127.0.0.1"


class LaunchError(UserError):
    """Environment that does not say which rank of how many this is, or lacks a device that another node may have."""

    exit_code = EXIT_CRASHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Place of this process among all processes of the run."""

    rank: int
    """0..world_size-1."""
    world_size: int
    """Number of processes, one per device."""
    local_rank: int
    """Index of the device on this host."""
    address: str
    """Host of rank 0; `LOOPBACK` if all ranks are on one."""
    port: int
    """TCP port of rank 0."""


def slurm_placement(env: Mapping[str, str], num_tasks: int) -> Placement:
    """Read the variables of a Slurm step with several tasks; KeyError if one is missing."""
    is_local = env.get("SLURM_STEP_NUM_NODES") == "1"
    first = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    return Placement(
        rank=int(env["SLURM_PROCID"]),
        world_size=num_tasks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        address=LOOPBACK if is_local else env.get("MASTER_ADDR", first),
        # Every task of a job computes the same port; jobs that share a host get different ones.
        port=int(env.get("MASTER_PORT", 20000 + int(env["SLURM_JOB_ID"]) % 20000)),
    )


def first_host(node_list: str) -> str:
    """Return the first name of a Slurm host list: `r[1-2]i[0,3]n07,other` gives `r1i0n07`."""
    match = re.match(r"(?:[^\[\],]|\[[^\[\]]+\])+", node_list)
    if match is None:
        raise LaunchError(f"cannot read the node list {node_list!r}; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match[0])


def gpu_index(placement: Placement, num_visible: int) -> int:
    """Return the index of this process's GPU: 0 if Slurm binds one to each task, else the local rank."""
    if num_visible == 1 and "SLURM_LOCALID" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return 0
    if placement.local_rank >= num_visible:
        raise LaunchError(
            f"local rank {placement.local_rank} has no CUDA device: this host shows {num_visible}; start one process "
            "per device"
        )
    return placement.local_rank


def open_store(placement: Placement, timeout: datetime.timedelta) -> torch.distributed.Store:
    """Start or join the ranks' store, on loopback alone if they are on one host, unlike torch's own; or torchrun's."""
    rank, world_size = placement.rank, placement.world_size
    if placement.address != LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(torch.distributed.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    listener = socket.create_server((LOOPBACK, placement.port)).detach() if rank == 0 else None
    return torch.distributed.TCPStore(
        LOOPBACK,
        placement.port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
        use_libuv=False,  # which takes no listener in torch 2.6
    )


def find_interface(first_host: str, store: torch.distributed.Store, rank: int, world_size: int) -> str:
    """Return the name of the network interface that reaches ranks on other hosts; all ranks call this together.

    A host's name often resolves to 127.0.1.1 on itself, where no other host reaches it: the first host then takes the
    interface that reaches a rank elsewhere. Nodes that are all one host, as Slurm may be told, have loopback.
    """
    name, address = _interface_to(first_host)
    store.set(f"address/{rank}", address)
    if not ipaddress.ip_address(address).is_loopback:
        return name
    addresses = (store.get(f"address/{other}").decode() for other in range(world_size))
    elsewhere = next((each for each in addresses if not ipaddress.ip_address(each).is_loopback), first_host)
    return _interface_to(elsewhere)[0]


def _interface_to(host: str) -> tuple[str, str]:
    """Return the name and the address of the network interface by which this host reaches another; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        source: str = probe.getsockname()[0]
    names = [name for name, entries in psutil.net_if_addrs().items() if source in {entry.address for entry in entries}]
    return (names or ["none"])[0], source


@contextlib.contextmanager
def naming_the_interface(address: str, port: int, rank: int) -> Iterator[None]:
    """Raise LaunchError with the network interface if the ranks do not meet in the block."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        with contextlib.suppress(OSError):
            name = name or _interface_to(address)[0]
        raise LaunchError(
            f"rank {rank} on {socket.gethostname()} did not meet the others at {address}:{port} by network interface "
            f"{name} ({str(error).splitlines()[0]}); set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the one that "
            "connects the hosts, or MASTER_ADDR to an address of the first host that all reach"
        ) from error
