"""How often the report's three facts tell what is wrong with a table, and how often they accuse a sound one.

    python tests/experiments/power.py --tables 40 > power.md

Grids of a known law with one fault each: nothing; all rows of a middle size 1 or 3 % high; all rows of the smallest
budget 2 % high; another law (`coupled`) in the place of Chinchilla's. A column a noise of points. "precise 5, predicted
30, fit 85, green 10, off 30 (0)" says in how many per cent of the tables each fact speaks against the law; how many are
green (`analysis.report.summary`); on how many the law misses ten times beyond in N and D by more than its interval, and
how many of these are green. Under each table stands the share of all tables that are off which are green.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from simulated_tables import DESIGNS, TRUTH, Array, markdown, quick_minima

from aimscale.analysis import fit, held_out, laws
from aimscale.analysis.report.summary import trust

NOISES = (0.001, 0.003, 0.01)
COUPLED = {"E": 0.2, "K": 40.0, "alpha": 0.9, "beta": 0.95, "c": 0.4, "w": 1.0}
"""Another law, of the same kind as the wrong one of a page."""
FAULTS = ("nothing", "a size 1 % high", "a size 3 % high", "a budget 2 % high", "another law")
BEYOND = 10.0
FACTS = {"How precise": "precise", "How it predicts": "predicted", "How far off": "fit"}
"""Question of a fact -> its short name."""


class Told(NamedTuple):
    """What is told of one table."""

    facts: frozenset[str]
    """Those that speak against the law."""
    is_green: bool
    is_off: bool
    """Whether the law misses beyond the table by more than its interval."""


def losses(scales: pd.DataFrame, fault: str) -> tuple[Array, Array]:
    """Return the true losses (n,) of a table with a fault, and (1,) beyond it."""
    far = {v: np.array([BEYOND * scales[v].max()]) for v in ("N", "D")}
    law, truth = (laws.LAWS["coupled"], COUPLED) if fault == "another law" else (laws.CHINCHILLA, TRUTH)
    clean, beyond = (law.value({v: np.asarray(x[v], float) for v in ("N", "D")}, truth) for x in (scales, far))
    if " high" in fault:
        v = "N" if "size" in fault else "D"
        values = np.sort(scales[v].unique())
        at = values[len(values) // 2] if v == "N" else values[0]
        clean = np.where(scales[v] == at, clean * (1 + float(fault.split()[2]) / 100), clean)
    return clean, beyond


def told(df: pd.DataFrame, truth: Array) -> Told:
    """Fit Chinchilla's law to a table, and judge it as the report does."""
    result = fit(df, "chinchilla", y="loss")
    judged = trust(replace(result, heldout=tuple(held_out(result, df, by=v) for v in ("N", "D"))), None)
    names = frozenset(FACTS[fact.question] for fact in judged.facts if fact.against)
    row = result.predict({v: BEYOND * df[v].max() for v in ("N", "D")}).iloc[0]
    return Told(names, judged.colour == "green", not row["ci_lo"] <= truth[0] <= row["ci_hi"])


def measure(cell: tuple[str, str, float], num: int) -> list[Told]:
    """Read tables of a design with a fault at a noise."""
    design, fault, noise = cell
    scales = DESIGNS[design].scales()
    clean, beyond = losses(scales, fault)
    rngs = (np.random.default_rng([i, crc32(repr(cell).encode())]) for i in range(num))
    tables = (scales.assign(loss=clean * np.exp(noise * rng.standard_normal(len(clean)))) for rng in rngs)
    with quick_minima():
        return [told(table, beyond) for table in tables]


def shown(tables: list[Told]) -> str:
    """Write the per cent of tables."""

    def share(holds: Iterator[bool]) -> str:
        return f"{100 * sum(holds) / len(tables):.0f}"

    facts = ", ".join(f"{name} {share(name in t.facts for t in tables)}" for name in FACTS.values())
    off = share(t.is_off for t in tables), share(t.is_off and t.is_green for t in tables)
    return f"{facts}, green {share(t.is_green for t in tables)}, off {off[0]} ({off[1]})"


def main() -> None:
    """Print a table a design."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=40, help="simulated tables a cell")
    parser.add_argument("--design", choices=list(DESIGNS), nargs="*", default=["5 x 4", "7 x 5", "7 x 5 x 3"])
    parser.add_argument("--fault", choices=FAULTS, nargs="*", default=list(FAULTS))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    for design in options.design:
        cells = list(itertools.product([design], options.fault, NOISES))
        columns, off = {f"{100 * noise:g} %": dict[str, str]() for noise in NOISES}, list[Told]()
        with ProcessPoolExecutor(options.workers) as pool:
            done = pool.map(partial(measure, num=options.tables), cells)
            for (_, fault, noise), tables in zip(cells, done, strict=True):
                columns[f"{100 * noise:g} %"][fault] = shown(tables)
                off += [table for table in tables if table.is_off]
                print(design, fault, noise, columns[f"{100 * noise:g} %"][fault], file=sys.stderr, flush=True)
        print(f"{markdown(columns, design)}\n\nOff: {len(off)}, green: {sum(t.is_green for t in off)}\n", flush=True)


if __name__ == "__main__":
    main()
