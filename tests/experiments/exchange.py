"""How long does a step wait for what its ranks must agree on? One exchange before each step, and one beside it.

`python tests/experiments/exchange.py 2 4 8 16` prints, for every number of ranks (processes over gloo), how many
milliseconds a step is held up: medians over steps, of a rank and of the slowest of them. Steps sleep, so that cores are
free, and end together, as gradients make them do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from aimscale.harness.data.stream.draws import Batch
from aimscale.harness.device.distributed import Group, find_placement, start_group, stop_group
from aimscale.harness.step.feed import Feed

STEP_S = 0.08
NUM_STEPS = 60


def held_up(group: Group, agree: Callable[[], object]) -> np.ndarray:
    """Milliseconds that the ranks took for `agree` before each step: (steps, ranks), the first steps left out."""
    took = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        agree()
        took.append(1000 * (time.perf_counter() - started))
        time.sleep(STEP_S)
        group.wait()
    return np.array(group.gather(took)).T[5:]


def measure(rank: int, world_size: int, port: int) -> None:
    """One rank."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")

    def batches() -> Iterator[list[Batch]]:
        for _ in range(NUM_STEPS + 1):
            yield [Batch(images=torch.zeros(1), given=torch.ones(1, dtype=torch.int64), positions=torch.zeros(1))]

    feed = Feed(group, num_tokens=16, max_bad_fraction=0.5, has_workers=True)
    before = held_up(group, lambda: group.sum_counts(15, 0, 0, 0, 0))
    with feed.over(batches()):  # type: ignore[arg-type]
        beside = held_up(group, lambda: feed.next(num_images=1, num_bad=0))
    if group.is_first:
        for name, took in (("before the step", before), ("beside it", beside)):
            slowest = np.median(took.max(axis=1))
            print(f"{world_size:3} ranks, {name:<15} {np.median(took):7.2f} ms, the slowest {slowest:7.2f}", flush=True)
    group.wait()
    stop_group()


def main() -> None:
    """Measure for every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int, nargs="+")
    context = multiprocessing.get_context("fork")
    for world_size in parser.parse_args().ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=measure, args=(rank, world_size, port)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
