"""A run of a sweep, whatever trains it, its cost card, and notices: what is said of runs and calls for attention.

Planner, queue, status and collection know a run by the members of `Run` alone. `AimRun` is trained by aimscale itself,
`ProgramRun` by a command of the sweep file.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from aimscale.harness.device.execution import ExecutionPlan
from aimscale.harness.device.speed import Clock, Device
from aimscale.harness.probe.features.tasks import ProbeCost
from aimscale.harness.results import Pending
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.section import Fields
from aimscale.sweeps.planning.sweepfile import Sweep

Stage = Literal["train", "evaluate"]
"""Part of a run that one program executes."""
Limit = Literal["compute", "loader"]
"""Resource that limits the speed of training."""
Once = Callable[..., Any]
"""Function that calls a function with arguments, and returns the first result for equal ones."""


def new_once() -> Once:
    """Make a `Once`, which reads each data set once for all runs."""
    return functools.cache(lambda function, *arguments: function(*arguments))


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What is said of a sweep or some of its runs: a line of a key and a text."""

    text: str
    key: str = ""
    """What it is about, such as the key of the sweep file to change; blank where the line above continues."""
    level: str = ""
    """Word that opens its line and calls attention: `fail` and `warn` of a plan, else a state of runs or `unstable`,
    `data-bound`; empty for a plain fact."""
    run_ids: tuple[str, ...] = ()

    def of(self, run_id: str) -> Notice:
        """Return the same notice about this run."""
        return replace(self, run_ids=(run_id,))


def problem(key: str, text: str) -> Notice:
    """Say why runs would fail, and which key of the sweep file to change."""
    return Notice(level="fail", key=key, text=text)


def caution(key: str, text: str) -> Notice:
    """Say what to read before runs start, and which key of the sweep file to change."""
    return Notice(level="warn", key=key, text=text)


def group_notices(notices: Iterable[Notice]) -> tuple[Notice, ...]:
    """Merge notices that say the same of several runs, in the order in which they come first."""
    run_ids: dict[Notice, dict[str, None]] = {}
    for notice in notices:
        run_ids.setdefault(replace(notice, run_ids=()), {}).update(dict.fromkeys(notice.run_ids))
    return tuple(replace(notice, run_ids=tuple(names)) for notice, names in run_ids.items())


def describe_runs(run_ids: Sequence[str], num_runs: int) -> str:
    """Describe which of `num_runs` runs are meant: one id, `all 6 runs`, or `2 of 6 runs, such as ...`."""
    if len(run_ids) == 1:
        return run_ids[0]
    if len(run_ids) == num_runs:
        return f"all {num_runs} runs"
    return f"{len(run_ids)} of {num_runs} runs, such as {run_ids[0]}"


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """Surroundings that the runs of a plan share."""

    sweep: Sweep
    device: Device
    """Device on which all runs are priced."""
    once: Once
    takes_measured: bool = True
    """Whether times that were measured on this machine count; else all follow from the assumptions alike."""


@dataclass(frozen=True, kw_only=True)
class Run(abc.ABC):
    """One planned run."""

    run_id: str
    """Slug and hash of what is trained."""
    config: Any
    """Configuration that is written to `config.yaml`; its parts are known to the kind of run alone."""
    cell: Fields
    """Axis -> value; budgets are in `config`."""
    devices: int
    """Devices that its stage uses at the same time: data-parallel ranks."""
    evaluation_devices: int
    """Devices of the program that evaluates it."""
    lr_multiplier: float | None
    """Factor of the recipe's learning rate, from base, override and axis; None without a recipe."""
    is_tuning: bool
    """Whether the run is one of `tune`, beside the grid."""
    stage: Stage = "train"
    """Part of the run that is to be executed, on `devices`."""

    @property
    def key(self) -> str:
        """Name of this stage of this run."""
        return self.run_id if self.stage == "train" else f"{self.run_id}/{self.stage}"

    @property
    def evaluation(self) -> Self:
        """The stage that evaluates the run."""
        return replace(self, stage="evaluate", devices=self.evaluation_devices)

    @property
    @abc.abstractmethod
    def budgets(self) -> tuple[int, ...]:
        """Budgets D of the run, ascending, one row of results each."""

    @property
    @abc.abstractmethod
    def num_params(self) -> int | None:
        """Parameters N; None if a program has not told them yet."""

    @property
    @abc.abstractmethod
    def grace_s(self) -> int:
        """Time that the run is given to save, s, between the signal to stop and the kill, by Slurm, the worker and the
        plan alike."""

    @property
    @abc.abstractmethod
    def threads(self) -> int:
        """Threads of the CPU that a process computes with."""

    @property
    def wants_cpu(self) -> bool:
        """Whether it asks for the CPU although there may be a GPU."""
        return False

    @property
    def is_one_process(self) -> bool:
        """Whether one process uses all of its devices; else there is one for each."""
        return False

    @property
    def is_normalised(self) -> bool:
        """Whether a constant prediction is known to have a loss of 1."""
        return False

    @property
    def unit(self) -> str:
        """What D counts."""
        return "images"

    @property
    def data(self) -> Mapping[str, str]:
        """Path of each data set that it reads -> fingerprint, where known."""
        return {}

    @property
    def awaited(self) -> str:
        """What its first step waits for, such as the weights of another run; empty for nothing."""
        return ""

    def requested(self, once: Once) -> Iterator[tuple[str, str]]:
        """Yield each task that is to be evaluated, with the name of the evaluation."""
        yield from ()

    @abc.abstractmethod
    def flops(self, images_seen: int) -> float | None:
        """Return C at a budget; None where N is not known."""

    @abc.abstractmethod
    def columns(self) -> dict[str, Any]:
        """Return the columns of its rows that are known before training."""

    @abc.abstractmethod
    def design(self) -> dict[str, Any]:
        """Return what two runs must share for one to forecast the other: everything but size and seed."""

    def is_measured(self, row: Mapping[str, Any]) -> bool:
        """Return whether the validation loss of a row is measured as the plan says."""
        return True

    def create(self, path: Path) -> None:
        """Make the run directory, or renew the configuration in one that no process executes."""
        RunDir.create(path, self.config)

    @abc.abstractmethod
    def is_configured(self, record: RunDir) -> bool:
        """Return whether the run directory holds this configuration, execution included."""

    @abc.abstractmethod
    def pending(self, record: RunDir, *, trust_note: bool = True) -> list[Pending]:
        """List the training and the evaluations that the run directory lacks (`pending_work`)."""

    def check_rows(self, record: RunDir, rows: Sequence[dict[str, Any]]) -> None:  # noqa: B027 - few kinds of run can
        """Raise RunDirError if rows differ from other files of the run directory."""

    @abc.abstractmethod
    def command(self, run_dirs: Sequence[Path]) -> list[str]:
        """Return the arguments of the Python interpreter that executes the stage: in one run directory, or for an
        evaluation, in several that are like it."""

    def fits(self, num_devices: int, device_bytes: int) -> bool:
        """Return whether the run can be executed on fewer GPUs than it asks for."""
        return False

    @abc.abstractmethod
    def card(self, context: PlanContext) -> CostCard:
        """Return its cost card."""

    @abc.abstractmethod
    def check(self, context: PlanContext) -> Iterator[Notice]:
        """Yield what would make the run fail."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of all devices of a run together."""

    mfu: float
    """MFU that is assumed."""
    flops_per_image: float
    """FLOPs of training that are executed per image."""
    compute_per_s: float
    """Images trained on per second if they are ready."""
    loaded_per_s: float
    """Images read per second."""

    num_measured: int = 0
    """Number of rows whose measured speed is taken instead of that MFU."""
    clock: Clock | None = None
    """Times measured on this machine, which are taken instead of that MFU."""

    @property
    def images_per_s(self) -> float:
        """Speed of training, by the slower of both."""
        return min(self.compute_per_s, self.loaded_per_s)

    @property
    def limit(self) -> Limit:
        """The slower of both."""
        return "loader" if self.loaded_per_s < self.compute_per_s else "compute"


@dataclass(frozen=True, kw_only=True)
class BudgetCost:
    """Cost of one budget, which becomes one row of the results."""

    images_seen: int
    epochs: float | None
    """D / U; null if the size of the pool is unknown."""
    flops: float | None
    """C: training FLOPs up to this budget, by the published formula; null where N is not known."""
    flops_6nd: float | None
    """6 N D, with N the parameters of backbone, head and preprocessor, and D in images x tokens."""


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """Cost of one run; what is not known of a program's is left out."""

    run: Run
    params_total: int | None
    """Parameters of backbone, head and preprocessor: N."""
    params_trunk: int | None = None
    """Parameters of the backbone alone, by which the paper names its sizes; null for a program."""
    budgets: tuple[BudgetCost, ...]
    images_executed: int
    """Images trained on: those of the stable phase and of the decay branch of every budget."""
    flops_executed: float
    """FLOPs that the devices execute: fewer per image than by the published formula (only scored tokens enter the
    head), for more images (decay branches)."""
    steps: int | None = None
    batch_size: int | None = None
    lr_peak: float | None = None
    device: Device
    """Assumed type of each device."""
    precision: str
    rates: Rates
    """Throughput of training and loading, all devices together."""
    fit: ExecutionPlan | None = None
    """ZeRO stage, micro-batch and memory of a rank, activations included; null if no choice fits."""
    stop_s: int
    """Grace period between the signal to stop and the kill, s."""
    disk_bytes: int = 0
    """Size of the run directory: the last checkpoint, that of the stable phase, one that is being written, and the
    weights of all budgets."""
    probes: tuple[ProbeCost, ...] = ()
    """Cost of each probe task at one budget."""
    flops_evaluation: float = 0.0
    """FLOPs of validation and probes at all budgets and points during training, as `harness.validation.cost` and
    `harness.probe.cost` count them."""
    points: int = 0
    """Number of validations during training."""
    flops_during: float = 0.0
    """Part of `flops_evaluation` that is spent during training."""
    share_during: float = 0.0
    """Share of `wall_s` that evaluation during training takes, 0..1."""
    limit: Limit = "compute"
    """Resource that limits the speed of training."""
    start_s: float = 0.0
    """Time of the starts of its programs, s; 0 where it was not measured."""
    training_s: float
    """Time of training, loading included, s."""
    evaluation_s: float = 0.0
    """Time of validation and probes at all budgets and points during training, s: their FLOPs at the speed of training,
    or their images at the speed of the loader, whichever takes longer."""
    wall_s: float
    """Sum of `start_s`, `training_s` and `evaluation_s`, s."""
    device_hours: float
    cautions: tuple[Notice, ...] = ()
    """Cautions to read before launching."""

    def slowdown(self, images_per_s: float | None) -> float | None:
        """Return how many times longer training takes at a measured speed than planned; None without one."""
        return self.images_executed / self.training_s / images_per_s if images_per_s else None
