"""The error of a difference: over pairs of runs, and over test images that two models share.

What is over test images holds for the very runs that were compared. Another seed is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from aimscale.analysis.fitting.covariance import Covariance, linear_design, sandwich
from aimscale.analysis.fitting.groups import groups_of
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.table.names import FOLDER
from aimscale.analysis.table.read import beside
from aimscale.analysis.table.schema import HITS_KEY

POWER = 0.8
"""Power of a minimum detectable effect."""
LEAST_SIZES = 3
"""Fewer sizes leave one degree of freedom or none to tell by how much sizes differ."""


class Hits(NamedTuple):
    """Test images that a probe got right; those of equal evaluations are the same."""

    evaluation: str
    num_test: int
    bits: bytes
    """`np.packbits` of one bit per image, in the data set's order."""

    @property
    def right(self) -> npt.NDArray[np.int8]:
        """1 per image (num_test,) that it got right, 0 elsewhere."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.num_test).astype(np.int8)


def hits_of(probes: pd.DataFrame) -> pd.Series:
    """Return `Hits` of every row of a `probe_frame` by `read_tables`; none where its table's folder has none of it."""
    found = beside(probes, "hits.parquet")
    if not found or not set(HITS_KEY) <= set(probes):
        return pd.Series([None] * len(probes), probes.index, object)
    on = [FOLDER, *HITS_KEY]
    # Baselines have no size: a column of blanks alone is of numbers on one side, and of words on the other.
    types = dict.fromkeys(on, object) | {"images_seen": float}
    known = pd.concat(found).drop_duplicates(on).astype(types)
    both = probes[[*on, "n"]].astype(types).merge(known, "left", on)
    rows = both[["n", "num_test", "evaluation", "hits"]].itertuples(index=False, name=None)
    hits = [Hits(evaluation, int(n), bits) if n == num_test else None for n, num_test, evaluation, bits in rows]
    return pd.Series(hits, probes.index, object)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A difference of accuracies over shared test images, as fractions, by its 95 % interval."""

    num_images: int
    discordant: float
    """Share of the images that one of the two gets right and the other does not; the mean over pairs."""
    low: float
    high: float
    detectable: float
    """Minimum detectable effect among so many discordant images."""
    p: float
    """p value of McNemar's exact test, a little more cautious than the interval; NaN over several pairs."""


def paired(
    baseline: Sequence[Hits | None], level: Sequence[Hits | None], weights: Sequence[float] = (1.0,)
) -> Paired | None:
    """Compare pairs of models image by image; None where hits are missing, or are of different test images.

    The interval is Bonett and Price's for paired proportions (Journal of Educational and Behavioral Statistics 37:479,
    2012): Wald's after one more image for either side, which Fagerland, Lydersen and Laake (Statistics in Medicine
    33:2850, 2014) recommend, few discordant images included. The detectable effect solves Connor's sample size
    (Biometrics 43:207, 1987) for it. Over several pairs, whose weights add up to 1, an image's gain is its mean.
    """
    hits = [each for each in (*baseline, *level) if isinstance(each, Hits)]
    if len(hits) < 2 * len(weights) or len({each[:2] for each in hits}) > 1:
        return None
    theirs, ours = np.split(np.array([each.right for each in hits]), 2)
    gains, discordant = weights @ (ours - theirs), float(weights @ np.abs(ours - theirs).mean(axis=1))
    n = len(gains) + 2
    centre, square = gains.sum() / n, (gains @ gains + 2) / n
    z, power = norm.ppf(0.5 + CONFIDENCE / 2), norm.ppf(POWER)
    half = z * np.sqrt((square - centre**2) / n)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Paired(
        num_images=len(gains),
        discordant=discordant,
        low=float(centre - half),
        high=float(centre + half),
        # d sqrt(n) = z sqrt(square) + power sqrt(square - d^2)
        detectable=float(np.sqrt(square) * (z * np.sqrt(n) + power * np.sqrt(n + power**2 - z**2)) / (n + power**2)),
        p=p if len(theirs) == 1 else np.nan,
    )


class Mean(NamedTuple):
    """Mean of a difference over pairs of runs, with its 95 % interval; NaN where nothing tells its error."""

    value: float
    low: float
    high: float
    detectable: float
    """Minimum detectable effect: the true difference that would be significant in 80 % of repetitions."""
    degrees: float
    """Degrees of freedom of the interval."""
    num_budgets: int
    """Budgets whose shared errors the interval holds; 0 where it speaks of these budgets alone."""


def mean_over_pairs(values: pd.Series, pairs: pd.DataFrame) -> Mean:
    """Average differences over pairs of runs, with an error that holds as far as the pairs reach.

    A size or a budget may suit one level better. So from three sizes on the variance is the sum of those clustered by
    sizes and, from three budgets on, by budgets (`fitting.covariance`), and the interval covers others like them. Two
    sizes do not tell how much sizes differ: the error is then that of pairs about the mean of their size (Student's,
    pooled), for these sizes alone. One pair a size has none.

    Args:
        values: a difference per pair of rows.
        pairs: `run_pair`, and `size` and `images_seen` where they are known and not what is compared.
    """
    runs = values.groupby(pairs["run_pair"])
    y, n, num_budgets = runs.mean().to_numpy(float), runs.ngroups, 0
    sizes = pairs.groupby("run_pair")["size"].first().map(str) if "size" in pairs else pd.Series(["one"] * n)
    codes, names = pd.factorize(sizes)
    mean = float(y.mean())
    if len(names) >= LEAST_SIZES:
        clustered = {"sizes": sandwich(linear_design(np.ones((n, 1)), np.ones(n)), y - mean, codes)}
        budgets = groups_of(pairs, {}).get("budgets")
        num_budgets = 0 if budgets is None or budgets.max() + 1 < LEAST_SIZES else int(budgets.max()) + 1
        if budgets is not None and num_budgets:
            weights = 1 / runs.transform("size").to_numpy(float)
            design = linear_design(np.ones((len(pairs), 1)), weights)
            clustered["budgets"] = sandwich(design, values.to_numpy(float) - mean, budgets)
        (se,), (degrees,) = Covariance(by=clustered).of_contrasts(np.ones((1, 1)))
    else:
        degrees = n - len(names) or np.nan
        within = y - pd.Series(y).groupby(codes).transform("mean").to_numpy()
        se = np.sqrt(within @ within / degrees / n)
    half, more = se * student.ppf([0.5 + CONFIDENCE / 2, POWER], degrees)
    return Mean(mean, float(mean - half), float(mean + half), float(half + more), float(degrees), num_budgets)
