"""What shows a run beside `metrics.jsonl`: TensorBoard, Weights & Biases, and profiles of steps.

Both loggers have the same names, by images seen (docs/loggers.md).

`train/...` is the trunk as it trains, `decay/...` the decays to all budgets, and `val/...` and `probe/...` hold a point
for each budget. So a panel fits any number of budgets, and its x axis never goes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimscale.harness.run.config import ConfigError, RunConfig, check_loggers
from aimscale.harness.run.directory import RunDir, State
from aimscale.harness.run.expected import ExpectedPoint
from aimscale.harness.run.files import write_text
from aimscale.harness.run.row import planned_columns

if TYPE_CHECKING:
    from aimscale.harness.distributed.group import Group

_log = logging.getLogger(__name__)

NOT_PLOTTED = ("images_seen", "step", "branch", "time", "attempt")
DECAYING = ("loss", "loss_max", "grad_norm", "lr", "images_done")
"""Columns that are plotted of a decay; speeds and counts continue the trunk's."""
FINISH_S = 60
"""Seconds that W&B may take at the end of a job to send the rest, unless WANDB_FINISH_TIMEOUT says otherwise."""
SKIPPED_STEPS = 5
"""Steps before those of a profile: they compile and allocate."""
MAX_MEMORY_EVENTS = 100_000
"""Number of allocations that a snapshot of memory goes back."""


def _images_done(run: RunDir) -> Iterator[int]:
    """Yield the images done at each of a run's lines; one that a kill cut off is skipped."""
    with contextlib.suppress(FileNotFoundError), run.metrics.open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                yield json.loads(line)["images_done"]


class TensorBoardLogger:
    """Writer of event files in `tensorboard/` of the run directory, a new one at every start."""

    def __init__(self, run: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.root / "tensorboard"))
        self.logged_until = max(_images_done(run), default=0)
        """Images done up to which earlier starts logged everything."""

    def log_values(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Plot numbers at their images seen."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, images_seen)
        self._writer.flush()  # what was logged is not logged again

    def close(self, state: State) -> None:
        """Write buffered events."""
        self._writer.close()


def _wandb_id(run: RunDir, config: RunConfig) -> str:
    """Return the id of this directory's run at W&B; a run that is trained again, in another one, has another id."""
    path = run.root / "wandb-id"
    if not path.exists():
        write_text(path, f"{config.run_id}-{uuid.uuid4().hex[:8]}")
    return path.read_text()


class WandbLogger:
    """Weights & Biases run, one for each run directory; offline it is kept in `wandb/` of the run directory.

    The configuration has the columns of the run's rows that are known before training at its top, to plot against and
    to be read back. Trouble with W&B never ends the training: without the service, a start is kept offline.

    Raises:
        ConfigError: W&B is not installed, has no login, or refuses its settings.
    """

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        check_loggers(config)
        import wandb

        sweep = run.root.parent.parent.name if run.root.parent.name == "runs" else None
        columns = planned_columns(config)
        about: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "aimscale"),
            "id": _wandb_id(run, config),
            "name": config.run_id,
            "resume": "allow",
            "dir": str(run.root),
            "group": os.environ.get("WANDB_RUN_GROUP", sweep),
            "job_type": "train",
            "tags": [config.training.model.size, *(f"D={budget}" for budget in config.evaluation.budgets)],
            "config": config.model_dump(mode="json") | columns | {"setup": json.dumps(columns["setup"])},
            "allow_val_change": True,  # budgets may be added
            "settings": {"finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_S))},
        }
        self._run: Any = None
        self.logged_until = 0
        """Images done up to which the service has everything; 0 offline, where nobody knows what will be sent."""
        try:
            self._run = wandb.init(**about)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError) as error:
            raise ConfigError(
                f"runtime.loggers names wandb, which refuses to start ({_brief(error)}); run `wandb login` or set "
                "WANDB_API_KEY, or keep runs on this machine with WANDB_MODE=offline"
            ) from error
        except wandb.errors.Error as error:
            later = f"send this start later with `wandb sync` from {run.root}"
            _log.warning("W&B cannot be reached (%s); %s", _brief(error), later)
            wandb.teardown()  # else W&B thinks that the run is in use
        with self._surviving():
            self._run = self._run or wandb.init(**about, mode="offline")
            # Decays and budgets go back in images_seen, which W&B's own step may not.
            for name in ("images_seen", "train/images_done", "decay/images_done"):
                self._run.define_metric(name, hidden=True)
            self._run.define_metric("*", step_metric="images_seen")
            logged = [self._run.summary.get(f"{part}/images_done", 0) for part in ("train", "decay")]
            self.logged_until = int(max(logged))

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Report an error of W&B in the block once, and stop logging to W&B instead of ending the run."""
        try:
            yield
        except Exception as error:
            _log.warning("W&B gets no more of this run (%s); its directory holds everything", _brief(error))
            self._run = None

    def log_values(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Plot numbers at their images seen."""
        if self._run is None:
            return
        with self._surviving():
            self._run.log({**values, "images_seen": images_seen})

    def close(self, state: State) -> None:
        """Send the rest, for at most `FINISH_S`, and how the job ended."""
        if self._run is None:
            return
        with self._surviving():
            if state == "preempted":
                self._run.mark_preempting()
            self._run.finish(exit_code=0 if state == "finished" else 1)


Logger = TensorBoardLogger | WandbLogger
"""Logger of a run's numbers, by `images_seen`, beside `metrics.jsonl`."""


@contextlib.contextmanager
def open_loggers(run: RunDir, config: RunConfig) -> Iterator[list[Logger]]:
    """Open the loggers of `runtime.loggers` for the block; at its end `status.json` must say how the job ended."""
    with contextlib.ExitStack() as stack:
        loggers: list[Logger] = []
        # W&B takes a run from one process: what is evaluated beside the training is sent by the next evaluation.
        is_beside = run.path != run.root and RunDir(run.root).is_held()
        for name in dict.fromkeys(each for each in config.runtime.loggers if not (is_beside and each == "wandb")):
            loggers.append(TensorBoardLogger(run) if name == "tensorboard" else WandbLogger(run, config))
            stack.callback(lambda logger: logger.close(run.read_status().state), loggers[-1])
        yield loggers


def line_scalars(line: Mapping[str, Any], *, is_cosine: bool) -> dict[str, float]:
    """Return the scalars plotted of a line of `metrics.jsonl`: `train/loss`, also for all of a cosine run, or
    `decay/loss` off the trunk."""
    is_trunk = line["branch"] is None or is_cosine
    names = [name for name in line if name not in NOT_PLOTTED] if is_trunk else DECAYING
    part = "train" if is_trunk else "decay"
    return {f"{part}/{name}": float(line[name]) for name in names if isinstance(line[name], int | float)}


def row_scalars(row: Mapping[str, Any], *, during: bool = False) -> dict[str, float]:
    """Return the scalars plotted of a budget's row, or of a line of `curve.jsonl` (`during` training)."""
    val = "train/val_loss" if during else "val/loss"
    values = {val: row.get("val_loss"), f"{val}_se": row.get("val_loss_se")}
    values |= {f"probe/{each['task']}/{each['kind']}": each.get("top1") for each in row.get("probes") or ()}
    return {name: float(value) for name, value in values.items() if value is not None}


def expected_scalars(points: Iterable[ExpectedPoint], images_seen: int, name: str) -> dict[str, float]:
    """Return the scalars plotted of a forecast beside a measured loss `name`: value and 95 % interval."""
    here = (each for each in points if each.images_seen == images_seen)
    ends = next(({"": each.loss, "_low": each.low, "_high": each.high} for each in here), {})
    return {f"{name}_expected{end}": value for end, value in ends.items()}


@contextlib.contextmanager
def profiled_steps(folder: Path, num_steps: int, group: Group) -> Iterator[Callable[[], None]]:
    """Profile so many steps of the block; yields what all ranks call after each step.

    Each rank writes `rank-<number>.json.gz`, a trace for ui.perfetto.dev, into `folder`, and on a GPU
    `rank-<number>.memory.pickle`, for pytorch.org/memory_viz.
    """
    import torch

    folder.mkdir(exist_ok=True)
    is_cuda = group.device.type == "cuda"

    def save(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / f"rank-{group.rank}.json.gz"))
        if is_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank-{group.rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
    schedule = torch.profiler.schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=1, active=num_steps, repeat=1)
    last = SKIPPED_STEPS + 1 + num_steps
    with torch.profiler.profile(schedule=schedule, on_trace_ready=save) as profile:

        def after_step() -> None:
            if profile.step_num < last:
                profile.step()
                if profile.step_num == last:
                    group.barrier()  # here and not in the next step's collectives, whose time is short

        yield after_step


def _brief(error: Exception) -> str:
    """Shorten an error to one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
