"""Coverage of what is not a law of N and D: correlations, contrasts, noise, repeats, links and two-step forecasts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.correlation import correlate
from aimscale.analysis.accuracy.links import forecast, link
from aimscale.analysis.coverage.designs import POINT_SD, TRUTH, Design, clean_losses, measured, shared_sd
from aimscale.analysis.coverage.laws import AHEAD
from aimscale.analysis.coverage.record import Record
from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.noise_sources import noise
from aimscale.analysis.effects.repetition import repeats
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA, REPEATED

CORRELATION = 0.6
"""Of two columns whose runs, and points within them, correlate alike."""
EFFECT = 0.004
"""Of one level of a column on ln loss."""
R_D = 6.0
"""Passes of the simulated law of repeats."""
CHANCE, CEILING, RATE, MIDDLE, ACCURACY_SD = 0.1, 0.9, 12.0, 0.5, 0.01
"""Of the simulated link from loss to accuracy."""


def accuracy(loss: Array) -> Array:
    """The simulated link."""
    return CHANCE + (CEILING - CHANCE) / (1 + np.exp(RATE * (loss - MIDDLE)))


def correlation_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Pearson's coefficient of two normal columns, of which half the variance is a run's where runs err."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    runs = np.unique(scales["run_id"], return_inverse=True)[1]
    covariance = [[1.0, CORRELATION], [CORRELATION, 1.0]]
    for _ in range(tables):
        pair = rng.multivariate_normal([0, 0], covariance, len(scales))
        if design.errors != "independent":
            pair = (pair + rng.multivariate_normal([0, 0], covariance, runs.max() + 1)[runs]) / np.sqrt(2)
        found = correlate(scales.assign(x=pair[:, 0], y=pair[:, 1]), x="x", y="y", methods=["pearson"])[0]
        record.add("correlation", found.low, found.high, found.value, CORRELATION)
    return record


def contrast_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Difference of ln loss between two levels of a column, paired over sizes and seeds."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    scales = scales.assign(size=scales["N"].map("{:.0f}".format), images_seen=scales["D"])
    for _ in range(tables):
        parts = []
        for level, effect in (("a", 0.0), ("b", EFFECT)):
            df = measured(scales.assign(run_id=scales["run_id"] + level), design.errors, rng)
            parts.append(df.assign(target=level, log_loss=np.log(df["loss"]) + effect))
        found = contrast(pd.concat(parts, ignore_index=True), by="target", baseline="a", measures=["log_loss"])
        one = found.contrasts[0]
        record.add("contrast", one.low, one.high, one.difference, EFFECT)
    return record


def noise_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """Standard deviation between seeds, and about the joint law."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    scales = scales.assign(size=scales["N"].map("{:.0f}".format), images_seen=scales["D"], params_total=scales["N"])
    scatter = float(np.hypot(POINT_SD, shared_sd(design.errors)))
    truth = {"between seeds": POINT_SD if design.errors == "size" else scatter, "scatter about the joint law": scatter}
    for _ in range(tables):
        found = noise(measured(scales, design.errors, rng).rename(columns={"loss": "other_loss"}), y="other_loss")
        for name, value in truth.items():
            part = found.component(name)
            assert part is not None
            record.add(f"noise {name}", part.low, part.high, part.value, value)
    return record


def repeats_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """R_D, from pools of a fifth and a hundredth of the largest D beside fresh data."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    most = float(scales["D"].max())
    pools = [scales.assign(U=u, run_id=scales["run_id"] + f"u{u:.0f}") for u in (most / 30, most / 6, most)]
    table = pd.concat(pools, ignore_index=True)
    truth = {**TRUTH, "R_D": R_D}
    clean = REPEATED.value({v: table[v].to_numpy() for v in ("N", "D", "U")}, truth)
    for _ in range(tables):
        df = measured(table, design.errors, rng)
        df["loss"] *= clean / clean_losses(table)
        df = df.rename(columns={"U": "unique_images", "D": "images_seen"})
        found = repeats(df, y="loss", resamples=300).fit
        i = found.intervals["R_D"]
        record.add("R_D of repeats", i.low, i.high, found.params["R_D"], R_D)
    return record


def forecast_coverage(design: Design, tables: int, *, seed: int = 0) -> Record:
    """A link's accuracy at a loss, and the two-step forecast of curve and measurement at unseen scales."""
    rng, record, scales = np.random.default_rng(seed), Record(), design.scales()
    ahead = CHINCHILLA.value(AHEAD, TRUTH)
    sd = float(np.hypot(POINT_SD, shared_sd(design.errors)))
    for _ in range(tables):
        df = measured(scales, design.errors, rng)
        df["top1"] = np.clip(accuracy(df["loss"].to_numpy()) + ACCURACY_SD * rng.standard_normal(len(df)), 0, 1)
        first = fit(CHINCHILLA, df, y="loss", resamples=400)
        second = link(df, loss="loss", accuracy="top1", chance=CHANCE, resamples=400)
        row = second.predict({"L": [MIDDLE]}).iloc[0]
        record.add("link at a loss (CI)", row["ci_lo"], row["ci_hi"], row["value"], float(accuracy(np.array(MIDDLE))))
        table = forecast(first, second, AHEAD).table
        new = accuracy(ahead * np.exp(sd * rng.standard_normal(2))) + ACCURACY_SD * rng.standard_normal(2)
        for k, where in enumerate(("inside", "3x beyond")):
            at = table.iloc[k]
            curve = float(accuracy(ahead)[k])
            record.add(f"two-step forecast {where} (CI)", at["ci_lo"], at["ci_hi"], at["accuracy"], curve)
            record.add(f"two-step measurement {where} (PI)", at["pi_lo"], at["pi_hi"], at["accuracy"], new[k])
    return record
