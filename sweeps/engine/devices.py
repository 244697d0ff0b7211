"""Devices of a worker: GPUs, or slots for processes on a machine without GPUs, and which of them are free."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aimscale.harness.device.execution import DoesNotFitError
from aimscale.harness.device.gpu_specs import gpus_here
from aimscale.sweeps.plan.costs import plan_execution
from aimscale.sweeps.plan.planner import Run

TRAIN_COMMAND = ("-m", "aimscale.harness.train")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one worker."""

    devices: int
    """GPUs of a node, or concurrent processes if it has no GPU."""
    gpus: tuple[str, ...] = ()
    """Values of CUDA_VISIBLE_DEVICES, one per GPU; empty without GPUs."""
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
        with contextlib.suppress(DoesNotFitError):
            return bool(plan_execution(run.config, self.devices, self.memory_bytes))
        return False

    def command(self, run_dir: Path, num_devices: int) -> list[str]:
        """Return the command that executes a run: python, torchrun for several devices, srun for several nodes."""
        if self.nodes > 1:
            step = ["srun", f"--nodes={self.nodes}", f"--ntasks-per-node={self.devices}", "--kill-on-bad-exit=1"]
            return [*step, *self.srun, *self.python, *TRAIN_COMMAND, str(run_dir)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_devices}"]
        torchrun += [
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
        ]  # srun forwards signals to every process
        return [*self.python, *(torchrun if num_devices > 1 else []), *TRAIN_COMMAND, str(run_dir)]


def local_machine(runs: Sequence[Run], *, devices: int | None = None) -> Machine:
    """Return the machine of this process: its visible GPUs, or as many processes as its cores can feed.

    Args:
        devices: number of devices to use; all by default.
    """
    gpus = visible_gpus()[:devices]
    threads = max((run.config.runtime.num_threads for run in runs), default=1)
    num = len(gpus) or devices or max(1, len(os.sched_getaffinity(0)) // threads)
    memory_bytes = min((num_bytes for _, num_bytes in gpus_here()), default=None) if gpus else None
    return Machine(devices=num, gpus=tuple(gpus), memory_bytes=memory_bytes)


def visible_gpus() -> list[str]:
    """Return the GPUs of CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    return [str(i) for i in range(len(gpus_here()))]


class DevicePool:
    """The devices of a machine that no run occupies."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._free = set(range(machine.devices))

    def acquire(self, run: Run) -> tuple[int, ...] | None:
        """Reserve devices for a run and return their indices, or None while too few are free."""
        num = min(run.devices, self._machine.devices)
        if len(self._free) < num:
            return None
        acquired = tuple(sorted(self._free)[:num])
        self._free -= {*acquired}
        return acquired

    def release(self, acquired: Sequence[int]) -> None:
        """Return the devices of a run that has ended."""
        self._free |= {*acquired}

    def environment(self, acquired: Sequence[int]) -> dict[str, str]:
        """Return the environment variables that confine a run to these GPUs and to its share of the host."""
        gpus = self._machine.gpus
        if not gpus or self._machine.nodes > 1:
            return {}
        share = len(acquired) / self._machine.devices
        visible = ",".join(gpus[i] for i in acquired)
        return {"CUDA_VISIBLE_DEVICES": visible, "AIMSCALE_HOST_SHARE": f"{share:.6f}"}
