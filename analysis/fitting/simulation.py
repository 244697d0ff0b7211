"""How often an interval that is called 95 % holds the truth: measured by simulating from a known law.

`python -m aimscale.analysis.fitting.simulation` repeats the numbers in the documentation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import pandas as pd

from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import HUBER_LOG, Objective
from aimscale.analysis.fitting.profiles import profile
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import CHINCHILLA


def coverage(
    law: Law,
    truth: Mapping[str, float],
    x: Mapping[str, Array],
    *,
    noise: float,
    ahead: Mapping[str, Array],
    tails: float = np.inf,
    objective: Objective | str = HUBER_LOG,
    cluster: Array | None = None,
    cluster_noise: float = 0.0,
    trials: int = 200,
    resamples: int = 400,
    profiles: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of simulated tables whose 95 % intervals hold the truth.

    Args:
        law: the law.
        truth: its parameters.
        x: design (n,) per variable.
        noise: standard deviation of the logarithm of a measurement.
        ahead: unseen scales at which curve and measurement are predicted.
        tails: degrees of freedom of the noise (Student); inf for normal.
        objective: what is minimised.
        cluster: labels (n,) of runs that share an error, resampled whole; None resamples points.
        cluster_noise: standard deviation of that shared error.
        trials: simulated tables.
        resamples: bootstrap resamples of each.
        profiles: also measure profile intervals (slow).
        seed: seed.

    Returns:
        One row an interval: interval, kind (bootstrap, profile, confidence or prediction), coverage, standard_error.
    """
    rng = np.random.default_rng(seed)
    n = len(next(iter(x.values())))
    clean, clean_ahead = law.value(x, truth), law.value(ahead, truth)
    hits: dict[tuple[str, str], list[bool]] = {}
    for trial in range(trials):
        error = noise * (rng.standard_normal(n) if np.isinf(tails) else rng.standard_t(tails, n))
        if cluster is not None:
            labels, member = np.unique(cluster, return_inverse=True)
            error = error + cluster_noise * rng.standard_normal(len(labels))[member]
        table = pd.DataFrame({**x, "y": clean * np.exp(error)})
        column = None if cluster is None else "run"
        if cluster is not None:
            table["run"] = cluster
        result = fit(law, table, y="y", objective=objective, resamples=resamples, cluster=column, seed=trial)
        for name, value in law.reported(truth).items():
            i = result.intervals[name]
            hits.setdefault((name, "bootstrap"), []).append(bool(i.low <= value <= i.high))
        if profiles:
            for name in law.names:
                p = profile(result, name)
                hits.setdefault((name, "profile"), []).append(bool(p.low <= truth[name] <= p.high))
        predicted = result.predict(ahead)
        shared = cluster_noise * rng.standard_normal(len(clean_ahead)) if cluster is not None else 0.0
        measured = clean_ahead * np.exp(noise * rng.standard_normal(len(clean_ahead)) + shared)
        inside = (predicted["ci_lo"] <= clean_ahead) & (clean_ahead <= predicted["ci_hi"])
        caught = (predicted["pi_lo"] <= measured) & (measured <= predicted["pi_hi"])
        for k in range(len(clean_ahead)):
            hits.setdefault((f"law at scale {k}", "confidence"), []).append(bool(inside.iloc[k]))
            hits.setdefault((f"measurement at scale {k}", "prediction"), []).append(bool(caught.iloc[k]))
    rows = []
    for (name, kind), each in hits.items():
        share = float(np.mean(each))
        error_of = float(np.sqrt(share * (1 - share) / len(each)))
        rows.append(
            {"interval": name, "kind": kind, "coverage": share, "standard_error": error_of, "trials": len(each)}
        )
    return pd.DataFrame(rows)


def grid_design(sizes: int, budgets: int) -> dict[str, Array]:
    """A full grid over two decades of N and 1.5 of D."""
    n, d = np.meshgrid(np.geomspace(1e5, 1e7, sizes), np.geomspace(1e5, 3e6, budgets))
    return {"N": n.ravel(), "D": d.ravel()}


def main() -> None:
    """Print coverage on a small and a large grid, for each objective and with shared errors of runs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    truth = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.4, "beta": 0.5}
    ahead = {"N": np.array([1e6, 3e7]), "D": np.array([1e6, 1e7])}
    for sizes, budgets in ((5, 4), (6, 6), (10, 12)):
        x = grid_design(sizes, budgets)
        for objective in ("huber_log", "log_lsq"):
            found = coverage(CHINCHILLA, truth, x, noise=0.003, ahead=ahead, objective=objective, trials=trials)
            print(f"\n{sizes} x {budgets} points, normal noise 0.3 %, {objective}, points resampled")
            print(found.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    x = grid_design(8, 6)
    run = np.unique(x["N"], return_inverse=True)[1]
    for label, groups in (("points resampled (wrong)", None), ("runs resampled", run)):
        found = _shared(truth, x, run, groups, ahead, trials)
        print(f"\n8 runs x 6 budgets, noise 0.2 % a point and 0.4 % shared by a run, log_lsq, {label}")
        print(found.to_string(index=False, float_format=lambda v: f"{v:.3f}"))


def _shared(
    truth: Mapping[str, float],
    x: Mapping[str, Array],
    run: Array,
    groups: Array | None,
    ahead: Mapping[str, Array],
    trials: int,
) -> pd.DataFrame:
    """Coverage where runs share an error, by resampling runs or (wrongly) points."""
    if groups is not None:
        return coverage(
            CHINCHILLA,
            truth,
            x,
            noise=0.002,
            ahead=ahead,
            objective="log_lsq",
            cluster=groups,
            cluster_noise=0.004,
            trials=trials,
        )
    rng = np.random.default_rng(1)
    law = CHINCHILLA
    hits: list[dict[str, bool]] = []
    for trial in range(trials):
        error = 0.002 * rng.standard_normal(len(run)) + 0.004 * rng.standard_normal(run.max() + 1)[run]
        table = pd.DataFrame({**x, "y": law.value(x, truth) * np.exp(error)})
        result = fit(law, table, y="y", objective="log_lsq", resamples=400, seed=trial)
        known = law.reported(truth)
        hits.append({k: bool(i.low <= known[k] <= i.high) for k, i in result.intervals.items()})
    share = pd.DataFrame(hits).mean()
    return pd.DataFrame({"interval": share.index, "kind": "bootstrap", "coverage": share.to_numpy(), "trials": trials})


if __name__ == "__main__":
    main()
