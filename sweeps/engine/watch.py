"""Watch over a run that trains: its losses against their forecast, the alarm, and whether it is to end.

The run knows nothing of it: it writes `curve.jsonl`, and is asked to stop by the signal that always asks it.
"""

from __future__ import annotations

import os

from aimscale.harness.run.expected import FILE, read_expected
from aimscale.harness.run.files import write_json
from aimscale.sweeps.engine.deviation import find_deviation, reason_to_stop
from aimscale.sweeps.engine.forecasts import curve_losses
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.state.record import RunRecord


class Watch:
    """Comparison of one run with its forecast, made anew when a point or the forecast is new."""

    def __init__(self, run: Run, record: RunRecord) -> None:
        self._run, self._record = run, record
        self._compared: list[int] = []

    def look(self) -> str | None:
        """Write how far the run is from its forecast, if that is new, and return why it is to end, if it is.

        Raises:
            OSError, UserError: files of the run cannot be read now.
        """
        paths = (self._record.curve, self._record.path / FILE)
        times = [os.stat(path).st_mtime_ns for path in paths if path.exists()]
        if len(times) < len(paths) or times == self._compared:
            return None
        if (expected := read_expected(self._record)) is None:
            return None
        deviation = find_deviation(expected, curve_losses(self._record, self._run))
        self._compared = times
        if deviation is None:
            return None
        since = deviation.since if deviation.is_alarm else None
        write_json(self._record.deviation, {"deviation": deviation.sd, "deviates_since": since}, durable=False)
        return reason_to_stop(expected, deviation)
