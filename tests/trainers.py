"""Trainers as a launcher starts them, with signals at chosen points, and comparison of their runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import aimscale.harness.log.record
from aimscale.aim.errors import UserError
from aimscale.harness.evaluate.run import evaluate
from aimscale.harness.run.directory import RunDir
from aimscale.harness.train.run import train

OF_ONE_RUN = {
    *(
        "weights_crc32",
        "wall_s",
        "device_hours",
        "images_per_s",
        "mfu",
        "finished_at",
        "git_commit",
        "run_id",
        "config_hash",
    )
}
"""Fields of a row that no two runs share."""


def train_alone_in(rank: int, path: Path) -> None:
    """Train in a process as a launcher starts it, and exit as the program does."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        sys.exit(train(path))
    except UserError as error:
        sys.exit(error.exit_code)


def train_in(rank: int, path: Path) -> None:
    """Train in a process as a launcher starts it, evaluate on the first rank alone, and exit as the programs do."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        exit_code = train(path)
        if exit_code == 0 and rank == 0:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            exit_code = evaluate([path])
        sys.exit(exit_code)
    except UserError as error:
        sys.exit(error.exit_code)


def evaluate_in(rank: int, *paths: Path) -> None:
    """Evaluate in a process as a launcher starts it, and exit as the program does."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        sys.exit(evaluate(paths))
    except UserError as error:
        sys.exit(error.exit_code)


def before_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Call `act` before the `number`-th and all later calls of a function of a module or class."""
    real, earlier = getattr(owner, name), iter(range(1, number))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(earlier, None) is None:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, call)


def after_steps(act: Callable[[int], None]) -> None:
    """Call `act(images done)` after every step that this process records."""
    real = aimscale.harness.log.record.Recorder.step

    def step(self: aimscale.harness.log.record.Recorder, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        act(self.metrics.images_done)

    aimscale.harness.log.record.Recorder.step = step  # type: ignore[method-assign]


def stop_after(rank: int, path: Path, num_images: int, signum: int = signal.SIGTERM) -> None:
    """Train, and signal the last rank once `num_images` are done: all ranks must agree to stop."""

    def act(images_done: int) -> None:
        if images_done == num_images and rank == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signum)

    after_steps(act)
    train_in(rank, path)


def rows(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows without the fields in `OF_ONE_RUN`."""
    return [{name: value for name, value in row.items() if name not in OF_ONE_RUN} for row in run.read_rows()]


def weights(run: RunDir, budget: int) -> dict[str, bytes]:
    """Return the bytes of a budget's tensors."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(run.model_file(budget)).items()}


def free_port() -> int:
    """Return a free port: several test processes may run on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_ranks(command: list[str], world_size: int) -> list[subprocess.Popen[str]]:
    """Start a command as every rank of a group, with pipes for the output of each."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [os.environ | here | group | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world_size)]
    return [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=each) for each in environments]
