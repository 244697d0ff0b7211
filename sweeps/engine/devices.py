"""Devices of a worker: GPUs, or slots for processes on a machine without GPUs, and which of them are free."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aimscale.harness.device.speed import find_gpu, gpus_here
from aimscale.harness.run.files import cache_folder
from aimscale.harness.run.lock import locked
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

RANKS_COMMAND = ("-m", "aimscale.harness.distributed.ranks")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one worker."""

    devices: int
    """GPUs of a node to use at the same time, or concurrent processes if it has no GPU."""
    gpus: tuple[str, ...] = ()
    """Values of CUDA_VISIBLE_DEVICES, one per GPU from which `devices` are chosen; empty without GPUs."""
    is_shared: bool = False
    """Whether other launches on this host may use the same devices, each of which is then leased."""
    needs_gpus: bool = False
    """Whether GPUs were reserved for the runs, which then fail without one."""
    nodes: int = 1
    """Number of nodes; with more than one, the worker runs on the first."""
    allow_fewer_devices: bool = True
    """Whether runs that request more devices are executed on the devices that exist, if they fit."""
    memory_bytes: int | None = None
    """Memory of a GPU, bytes; None if unknown."""
    srun: tuple[str, ...] = ()
    """Additional arguments of the srun that starts a run on several nodes."""
    python: tuple[str, ...] = (sys.executable,)
    """Interpreter of runs, preceded by the command that enters a container on other nodes."""

    @property
    def stop_signal(self) -> signal.Signals:
        """Signal that asks a run to save and exit: srun forwards USR2 to the ranks, and kills them on TERM."""
        return signal.SIGUSR2 if self.nodes > 1 else signal.SIGTERM

    def can_run(self, run: Run) -> bool:
        """Return whether a run can be executed here: one that fits on one node, or one that fills several nodes."""
        if self.nodes > 1:
            return run.devices == self.nodes * self.devices
        if run.devices <= self.devices or not self.allow_fewer_devices or self.memory_bytes is None:
            return run.devices <= self.devices or self.allow_fewer_devices
        return run.fits(self.devices, self.memory_bytes)

    def command(self, run: Run, run_dirs: Sequence[Path], num_devices: int) -> list[str]:
        """Return the command that executes the stage of a run, or of several that are like it: a process, several of
        them on one node, or srun on several nodes."""
        words = run.command(run_dirs)
        if self.nodes > 1:
            step = ["srun", f"--nodes={self.nodes}", f"--ntasks-per-node={self.devices}", "--kill-on-bad-exit=1"]
            return [*step, *self.srun, *self.python, *words]
        is_group = num_devices > 1 and not run.is_one_process
        return [*self.python, *((*RANKS_COMMAND, str(num_devices)) if is_group else ()), *words]


def local_machine(runs: Sequence[Run], *, devices: int | None = None) -> Machine:
    """Return the machine of this process: its visible GPUs, or `devices` or all processes that its cores feed."""
    gpus = visible_gpus()
    threads = max((run.threads for run in runs), default=1)
    num = min(len(gpus), devices or len(gpus)) or devices or max(1, len(os.sched_getaffinity(0)) // threads)
    memory_bytes = min((num_bytes for _, num_bytes in gpus_here()), default=None) if gpus else None
    # Slurm gives each job devices of its own, and may number them alike.
    is_shared = "SLURM_JOB_ID" not in os.environ
    return Machine(devices=num, gpus=tuple(gpus), memory_bytes=memory_bytes, is_shared=is_shared)


def refuse_other_machine(sweep: Sweep, runs: Sequence[Run], machine: Machine, *, is_said: bool) -> None:
    """Raise SweepError for runs that were planned for GPUs, or for more of them, than this machine has.

    Args:
        is_said: whether the user said how many devices to take, so that runs on fewer of them are wanted.
    """
    device, num_devices = sweep.file.cost.device, max((run.devices for run in runs), default=1)
    if machine.gpus and num_devices > machine.devices and not is_said:
        raise SweepError(
            f"{sweep.source}: a run is planned on {num_devices} devices, and this machine has {machine.devices}; "
            f"launch it on Slurm (a section `slurm:`), or say --devices {machine.devices} for runs that take longer"
        )
    is_on_cpu = all(run.wants_cpu for run in runs)
    if device and find_gpu(device) and not machine.gpus and not is_on_cpu:
        raise SweepError(
            f"{sweep.source}: it is planned for {device} (cost.device), and no GPU is visible here; launch it where "
            "one is, or take cost.device out to train on this machine's cores"
        )


def visible_gpus() -> list[str]:
    """Return the GPUs of CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    return [str(i) for i in range(len(gpus_here()))]


class DevicePool:
    """The devices of a machine, of which no two runs of its launches use one at the same time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._leases: dict[int, contextlib.ExitStack] = {}
        self.others: dict[str, None] = {}
        """Ids of the processes that used a device when one was last asked for in vain."""
        # A launch that uses some processor cores takes any that no other launch uses.
        num_cores = len(os.sched_getaffinity(0)) if machine.is_shared else 0
        self._indices = range(len(machine.gpus) or max(machine.devices, num_cores))

    @property
    def num_free(self) -> int:
        """Number of devices that this launch may use and does not."""
        return self._machine.devices - len(self._leases)

    def acquire(self, run: Run) -> tuple[int, ...] | None:
        """Reserve devices for a run and return their indices, or None while too few are free."""
        num = min(run.devices, self._machine.devices)
        acquired: list[int] = []
        self.others = {}
        for i in self._indices if num <= self.num_free else ():
            if len(acquired) < num and i not in self._leases and (lease := self._lease(i)):
                self._leases[i] = lease
                acquired.append(i)
        if len(acquired) == num:
            return tuple(acquired)
        self.release(acquired)
        return None

    def _lease(self, index: int) -> contextlib.ExitStack | None:
        """Lock a device for this process; None if another launch of this user on this host uses it."""
        lease = contextlib.ExitStack()
        if self._machine.is_shared:
            name = f"gpu-{self._machine.gpus[index]}" if self._machine.gpus else f"core-{index}"
            path = cache_folder() / "devices" / f"{socket.gethostname()}-{name}"
            with contextlib.suppress(OSError):  # a home that cannot be written or locked protects no device
                if not lease.enter_context(locked(path, wait=False)):
                    with contextlib.suppress(OSError):  # the holder may be gone by now, and its file with it
                        self.others[path.read_text()] = None
                    return None
                path.write_text(str(os.getpid()))
        return lease

    def release(self, acquired: Sequence[int]) -> None:
        """Return the devices of a run that has ended."""
        for i in acquired:
            self._leases.pop(i).close()

    def environment(self, acquired: Sequence[int]) -> dict[str, str]:
        """Return the environment variables that confine a run to these GPUs and to its share of the host."""
        gpus = self._machine.gpus
        told = {"AIMSCALE_DEVICE": "cuda"} if self._machine.needs_gpus else {}
        if not gpus or self._machine.nodes > 1:
            return told
        share = len(acquired) / len(gpus)
        visible = ",".join(gpus[i] for i in acquired)
        return told | {"CUDA_VISIBLE_DEVICES": visible, "AIMSCALE_HOST_SHARE": f"{share:.6f}"}
