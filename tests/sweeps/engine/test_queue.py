"""What a worker does with a run that is not its own any more."""

from __future__ import annotations

from typing import Any

from aimscale.harness.run.lock import Lock, hold_lock
from aimscale.sweeps.engine import queue, worker
from aimscale.sweeps.engine.devices import Machine
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import prepare_directory
from aimscale.sweeps.state.run_state import RunState


def test_a_run_that_another_worker_has_claimed_since_is_left_to_it(write_sweep: Any, stand_in: Any) -> None:
    """It was free when the queue was read: only the claim, taken before anything is written, decides."""
    planned = PlannedSweep(write_sweep(sizes=["rung-32"]))
    prepare_directory(planned.sweep, planned.longest_first)
    (free,) = planned.states
    assert free.state.startable
    one = worker.Worker(sweep=planned.sweep, machine=Machine(devices=1), waiting=[free.run], command=stand_in())
    with hold_lock(free.record.claim):
        found = queue._claim(one, free, Lock(free.record.claim), num_devices=1)
        assert isinstance(found, RunState)
        assert not free.record.config.exists()
    assert isinstance(queue._claim(one, free, Lock(free.record.claim), num_devices=1), queue.Part)
    assert free.record.config.exists()
