from __future__ import annotations

from aimscale.harness.run import timeouts


def test_who_knows_most_waits_least() -> None:
    values = {name: value for name, value in vars(timeouts).items() if name.endswith("_S")}
    assert list(values.values()) == sorted(values.values()), "the file is in order"
    assert timeouts.FAILURE_NOTE_TIMEOUT_S + timeouts.LAST_SAVE_TIMEOUT_S < timeouts.EXIT_TIMEOUT_S
    assert timeouts.EXIT_TIMEOUT_S < timeouts.STEP_TIMEOUT_S < timeouts.PHASE_TIMEOUT_S < timeouts.LOST_AFTER_S
    assert 2 * timeouts.BATCH_TIMEOUT_S <= timeouts.COLLECTIVE_TIMEOUT_S
    assert 10 * timeouts.HEARTBEAT_S < timeouts.SILENT_AFTER_S <= timeouts.FRESH_S
