"""Where the ranks of a run meet: the store by which they find each other, and the network interface between them."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import EXIT_CRASHED
from aimscale.harness.run.timeouts import RENDEZVOUS_TIMEOUT_S

LOOPBACK = "127.0.0.1"


class LaunchError(UserError):
    """Environment that does not say which rank of how many this is, or lacks a device that another node may have."""

    exit_code = EXIT_CRASHED


def meet(
    address: str, port: int, rank: int, world_size: int, *, local_timeout_s: float, device: torch.device | None
) -> Any:
    """Join the process group of the ranks and return a group for values on the host, None without other ranks.

    Args:
        address: host of the first rank; `LOOPBACK` if all are on one host.
        local_timeout_s: time within which ranks on one host meet.
        device: GPU of this rank, if it has one.

    Raises:
        LaunchError: ranks on several hosts did not meet within `RENDEZVOUS_TIMEOUT_S`.
    """
    is_alone, is_local = world_size == 1, address == LOOPBACK
    timeout = datetime.timedelta(seconds=local_timeout_s if is_alone or is_local else RENDEZVOUS_TIMEOUT_S)
    gloo_timeout = timeout if is_alone or is_local else timeout / 5  # gloo waits five times as long for a connection
    with contextlib.nullcontext() if is_alone or is_local else _naming_the_interface(address, port, rank):
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore() if is_alone else _open_store(address, port, rank, world_size, timeout)
            if "GLOO_SOCKET_IFNAME" not in os.environ:  # on one host, do not listen on a network
                os.environ["GLOO_SOCKET_IFNAME"] = (
                    "lo" if is_alone or is_local else _find_interface(address, store, rank, world_size)
                )
            torch.distributed.init_process_group(
                "gloo" if device is None else "nccl",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=gloo_timeout if device is None else timeout,
                device_id=device,
            )
        return None if is_alone else torch.distributed.new_group(backend="gloo", timeout=gloo_timeout)


def _open_store(
    address: str, port: int, rank: int, world_size: int, timeout: datetime.timedelta
) -> torch.distributed.Store:
    """Start or join the ranks' store, on loopback alone if they are on one host, unlike torch's own; or torchrun's."""
    if address != LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(torch.distributed.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    listener = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
    return torch.distributed.TCPStore(
        LOOPBACK,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
        use_libuv=False,  # which takes no listener in torch 2.6
    )


def _find_interface(first_host: str, store: torch.distributed.Store, rank: int, world_size: int) -> str:
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
def _naming_the_interface(address: str, port: int, rank: int) -> Iterator[None]:
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
