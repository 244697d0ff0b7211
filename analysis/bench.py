"""Speed of the fitter against the usual ways, on one machine in one run: `aimscale bench fit`.

The job is that of Epoch's replication of Chinchilla: 240 points, Huber loss (delta 1e-3) on log residuals and 4000
bootstraps.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize as scipy_minimize

from aimscale.analysis.fitting.bootstrap import legacy_counts
from aimscale.analysis.fitting.intervals import bootstrap_draws
from aimscale.analysis.fitting.objectives import HUBER_DELTA, HUBER_LOG
from aimscale.analysis.fitting.optimise import global_minimum, make_problem
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA

LIMIT_FIT_MS = 25.0
LIMIT_BOOTSTRAP_S = 5.0
OPTIMUM = {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672}
"""Law behind the built-in table."""
GRID = {
    "a": np.arange(0, 30, 5),
    "b": np.arange(0, 30, 5),
    "e": np.arange(-1, 1.5, 0.5),
    "alpha": np.arange(0, 2.5, 0.5),
    "beta": np.arange(0, 2.5, 0.5),
}
"""The replication's 6 x 6 x 5 x 5 x 5 = 4500 starts (ln A, ln B, ln E, alpha, beta)."""


def built_in_table() -> pd.DataFrame:
    """240 points N, D, loss of a known law with Laplace noise of 0.5 %, over the range of Chinchilla's runs."""
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(6e7), np.log(1.6e10), 240))
    d = np.exp(rng.uniform(np.log(1e9), np.log(3e11), 240))
    loss = CHINCHILLA.value({"N": n, "D": d}, OPTIMUM) * np.exp(rng.laplace(0, 0.005, 240))
    return pd.DataFrame({"N": n, "D": d, "loss": loss})


def log_sum_exp_objective(df: pd.DataFrame) -> Callable[[Array], tuple[float, Array]]:
    """Huber objective and gradient in (ln A, ln B, ln E, alpha, beta), as the replication writes it."""
    log_n, log_d, log_y = (np.log(df[c].to_numpy(float)) for c in ("N", "D", "loss"))

    def value_and_gradient(p: Array) -> tuple[float, Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            logs = np.stack([p[0] - p[3] * log_n, p[1] - p[4] * log_d, np.full_like(log_n, p[2])])
            top = logs.max(axis=0)
            parts = np.exp(logs - top)
            total = parts.sum(axis=0)
            r = top + np.log(total) - log_y
        size = np.abs(r)
        loss = np.where(size <= HUBER_DELTA, 0.5 * r * r, HUBER_DELTA * (size - 0.5 * HUBER_DELTA)).sum()
        share = np.clip(r, -HUBER_DELTA, HUBER_DELTA) * parts / total
        slopes = share.sum(axis=1)
        return float(loss), np.array([*slopes, -(share[0] @ log_n), -(share[1] @ log_d)])

    return value_and_gradient


def run(table: pd.DataFrame | None = None, *, grid_starts: int = 4500, num_bootstraps: int = 4000) -> dict[str, Any]:
    """Time this fitter, the start grid with L-BFGS-B and analytic gradient, and PyPI `chinchilla` if it is installed.

    Args:
        table: N, D and loss; None takes the built-in table.
        grid_starts: how many of the grid's 4500 starts to run (evenly spread); the time is scaled up to all.

    Returns:
        Times, objectives, ratios, limits and whether they are met, machine and versions.
    """
    df = built_in_table() if table is None else table
    problem = make_problem(CHINCHILLA, {"N": df["N"], "D": df["D"]}, df["loss"].to_numpy(), HUBER_LOG)
    fit_s = min(_timed(lambda: global_minimum(problem))[0] for _ in range(10))
    minima = global_minimum(problem)
    counts = legacy_counts(len(df), num_bootstraps, 42)
    bootstrap_s, draws = _timed(lambda: bootstrap_draws(problem, minima, counts))
    grid = start_grid(df, grid_starts)
    peer = pypi_chinchilla(df)
    out: dict[str, Any] = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "num_points": len(df),
        "fit_ms": 1e3 * fit_s,
        "fit_objective": minima[0].total,
        "bootstrap_s": bootstrap_s,
        "num_bootstraps": num_bootstraps,
        "bootstrap_se_alpha": float(draws["alpha"].std(ddof=1)),
        "limits": {"fit_ms": LIMIT_FIT_MS, "bootstrap_s": LIMIT_BOOTSTRAP_S},
        "met": {"fit_ms": 1e3 * fit_s < LIMIT_FIT_MS, "bootstrap_s": bootstrap_s < LIMIT_BOOTSTRAP_S},
        "start_grid": grid | {"ratio": grid["seconds"] / fit_s},
        "pypi_chinchilla": peer if "seconds" not in peer else peer | {"ratio": peer["seconds"] / fit_s},
    }
    others = [grid["objective"]] + ([peer["objective"]] if "seconds" in peer else [])
    out["no_worse_than_peers"] = bool(out["fit_objective"] <= min(others) * (1 + 1e-9))
    return out


def _timed(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = job()
    return time.perf_counter() - start, result


def start_grid(df: pd.DataFrame, num_starts: int) -> dict[str, Any]:
    """The replication's grid of starts, each refined by L-BFGS-B with the analytic gradient."""
    objective = log_sum_exp_objective(df)
    starts = np.array(list(itertools.product(*GRID.values())), float)
    chosen = starts[np.linspace(0, len(starts) - 1, min(num_starts, len(starts))).astype(int)]
    seconds, found = _timed(lambda: [scipy_minimize(objective, s, jac=True, method="L-BFGS-B").fun for s in chosen])
    best = float(min(found))
    return {
        "starts_run": len(chosen),
        "seconds": seconds * len(starts) / len(chosen),
        "objective": best,
        "share_within_1e-4": float(np.mean(np.array(found) < best * (1 + 1e-4))),
    }


def pypi_chinchilla(df: pd.DataFrame) -> dict[str, Any]:
    """PyPI `chinchilla` on the same grid of starts and objective, or why it was not timed."""
    if importlib.util.find_spec("chinchilla") is None:
        return {"skipped": "the package `chinchilla` is not installed (pip install -e '.[peers]')"}
    try:
        peer = importlib.import_module("chinchilla").Chinchilla
    except ImportError as error:
        return {"skipped": f"the package `chinchilla` does not import here: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        rows = df.assign(C=6 * df["N"] * df["D"])[["C", "N", "D", "loss"]]
        rows.to_csv(Path(folder) / "df.csv", index=False)
        model = peer(
            folder,
            param_grid={name: GRID[name].tolist() for name in ("e", "a", "b", "alpha", "beta")},
            loss_fn=_log_huber,
        )  # fmt: skip
        seconds, _ = _timed(lambda: model.fit())
        found = model.get_params()
    point = np.array([np.log(found["A"]), np.log(found["B"]), np.log(found["E"]), found["alpha"], found["beta"]])
    return {"seconds": seconds, "objective": log_sum_exp_objective(df)(point)[0]}


def _log_huber(measured: Array, predicted: Array) -> Array:
    """Huber loss of log residuals over delta^2: unscaled, the package's mean would make its optimiser stop early."""
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.abs(np.log(measured) - np.log(predicted)) / HUBER_DELTA
    return np.where(size <= 1, 0.5 * size * size, size - 0.5)


def table(result: dict[str, Any]) -> str:
    """The result of `run` as lines for a terminal."""
    grid, peer, limits = result["start_grid"], result["pypi_chinchilla"], result["limits"]
    lines = [
        f"Chinchilla fit on {result['num_points']} points, {result['machine']}",
        f"one fit              {result['fit_ms']:9.1f} ms  objective {result['fit_objective']:.10e}  "
        f"(limit {limits['fit_ms']:.0f} ms)",
        f"{result['num_bootstraps']} bootstraps      {result['bootstrap_s']:9.2f} s   "
        f"(limit {limits['bootstrap_s']:.0f} s)",
        f"4500-start grid      {grid['seconds']:9.1f} s   objective {grid['objective']:.10e}  "
        f"{grid['ratio']:.0f} times one fit ({grid['starts_run']} starts run)",
    ]
    if "seconds" in peer:
        lines.append(
            f"PyPI chinchilla      {peer['seconds']:9.1f} s   objective {peer['objective']:.10e}  "
            f"{peer['ratio']:.0f} times one fit"
        )
    else:
        lines.append(f"PyPI chinchilla      not run: {peer['skipped']}")
    verdict = "no worse than" if result["no_worse_than_peers"] else "WORSE than"
    return "\n".join([*lines, f"objective {verdict} the peers'"])
