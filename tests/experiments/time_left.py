"""How far off is the time left that `status` tells? A sweep launched for real, and looked at every few seconds.

`python tests/experiments/time_left.py SWEEP.yaml [ROOT]` prints, at 5 to 90 % of the time that the sweep took, what
was left, what was told, and the error of both ways to see it: of what was left, and of the whole. A machine that does
other work meanwhile changes its pace; what nobody could have known then counts here as an error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from aimscale.sweeps.monitor.layout import format_duration
from aimscale.sweeps.monitor.status import SweepStatus, sweep_status
from aimscale.sweeps.state.planned_sweep import plan_sweep

EVERY_S = 2.0
SHARES = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 0.9)


def watched_launch(name: str, root: Path) -> tuple[list[tuple[float, SweepStatus]], float]:
    """Launch a sweep; (seconds since its start, status) again and again, and the seconds that it took."""
    planned = plan_sweep(name, root)
    started, seen = time.monotonic(), []
    words = [sys.executable, "-m", "aimscale", "launch", name, "--root", str(root)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        planned.look()
        seen.append((time.monotonic() - started, sweep_status(planned)))
        time.sleep(EVERY_S)
    return seen, time.monotonic() - started


def main() -> None:
    """Print a line per share of the sweep's time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("root", type=Path, nargs="?", default=Path("aimscale-runs"))
    arguments = parser.parse_args()
    seen, took_s = watched_launch(arguments.sweep, arguments.root)
    print(f"{arguments.sweep}: {format_duration(took_s)}")
    for share in SHARES:
        at_s, status = min(seen, key=lambda each: abs(each[0] - share * took_s))
        left_s, told_s = took_s - at_s, status.eta_s
        basis = "measured" if status.eta_is_measured else "by the plan"
        if told_s is None:
            print(f"{share:4.0%}  {format_duration(left_s):>8} left, nothing told")
            continue
        error_s = told_s - left_s
        print(
            f"{share:4.0%}  {format_duration(left_s):>8} left, {format_duration(told_s):>8} told ({basis}): "
            f"{error_s / left_s:+.0%} of what was left, {error_s / took_s:+.0%} of the whole"
        )


if __name__ == "__main__":
    main()
