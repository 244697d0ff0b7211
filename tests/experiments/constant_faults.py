"""How often a run whose losses are 3 or 5 % too high is told, from its first point on or from half way on.

    python tests/experiments/constant_faults.py

Simulated runs of 32 points about a forecast whose errors are those of docs/forecasts.md: on CIFAR-10 a standard
deviation of 0.9 % for a run and its points, on photographs of 2 %, a third of it of a point alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from simulated_tables import markdown

from aimscale.analysis.forecasts.trajectory import DOF
from aimscale.harness.run.expected import Expected, ExpectedPoint
from aimscale.sweeps.engine.forecasts import ERROR_CORRELATION_LENGTH, PERSISTENT, alarm_threshold, error_root, scan

IMAGES = np.arange(1, 33) * 2048
ERRORS = {"CIFAR-10": 0.009, "photographs": 0.02}
NUM_RUNS = 1000


def main() -> None:
    """Simulate and print per cent of runs that raise an alarm."""
    rng, columns = np.random.default_rng(0), dict[str, dict[str, str]]()
    for name, sd in ERRORS.items():
        points = [ExpectedPoint(images_seen=int(i), loss=1, low=1, high=1, sd=sd, noise=sd / 3) for i in IMAGES]
        expected = Expected(basis="", points=tuple(points), memory=ERROR_CORRELATION_LENGTH)
        expected = dataclasses.replace(expected, alarm_sd=alarm_threshold(expected, DOF))
        column = columns[f"{name}, alarm at {expected.alarm_sd:.1f} sd"] = {}
        for size in (0.0, 0.03, 0.05):
            for begin in (0.0, 0.5) if size else (0.0,):
                errors = error_root(expected) @ rng.standard_normal((len(IMAGES), NUM_RUNS))
                fault = size * (begin * IMAGES[-1] < IMAGES)[:, None]
                deviations = scan(expected, errors + fault)[0][PERSISTENT - 1 :]
                when = f", from {'half way' if begin else 'the first point'} on" * (size > 0)
                told = 100 * np.mean((deviations > expected.alarm_sd).any(axis=0))
                column[f"{100 * size:.0f} % too high{when}"] = f"{told:.0f} %"
    print(markdown(columns, "loss"))


if __name__ == "__main__":
    main()
