"""Tables of a known law with known errors, for the scripts that measure how often statements about them are true."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from unittest.mock import patch
from zlib import crc32

import numpy as np
import pandas as pd

from aimscale.analysis import laws
from aimscale.analysis.fitting import problem

Array = np.ndarray
T = TypeVar("T")

TRUTH = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.38, "beta": 0.40}
POINT_SD, SHARED_SD = 0.003, 0.005
"""Standard deviations of the errors of ln loss: of a point alone, and of each group that shares one."""
EXPONENT = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
LOG_K = float(
    np.log(TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"]) * 6 ** -TRUTH["beta"])
    / (TRUTH["alpha"] + TRUTH["beta"])
)
"""a and ln k of the law's N*(C) = k C^a at C = 6 N D."""
ERRORS: dict[str, tuple[str, ...]] = {
    "independent": (),
    "size": ("size",),
    "run": ("run",),
    "budget": ("budget",),
    "size and budget": ("size", "budget"),
}
"""Name -> groups whose points share an error."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Where and how a table is measured."""

    sizes: int
    budgets: int
    seeds: int = 1
    isoflop: bool = False
    """Sizes, powers of two, about the optimum of each budget C, in place of a grid of N and D."""
    is_random: bool = False
    """Whether every row has a D of its own, drawn at random (one seed: the design is always the same)."""

    def scales(self) -> pd.DataFrame:
        """Return the table without its losses."""
        if self.isoflop:
            flops = np.geomspace(1e12, 3e14, self.budgets)
            nearest = np.round(np.log2(np.exp(LOG_K + EXPONENT * np.log(flops))))[:, None]
            n = (2.0 ** (nearest + np.arange(self.sizes) - (self.sizes - 1) // 2)).ravel()
            d = np.repeat(flops, self.sizes) / (6 * n)
        else:
            grid = np.meshgrid(np.geomspace(1e5, 1e7, self.sizes), np.geomspace(1e5, 3e6, self.budgets))
            n, d = (each.ravel() for each in grid)
        if self.is_random:
            d = np.exp(np.random.default_rng(0).uniform(np.log(d.min()), np.log(d.max()), len(d)))
        once = pd.DataFrame({"N": n, "D": d, "C": 6 * n * d, "size": [f"{v:.0f}" for v in n]})
        table = pd.concat([once.assign(seed=s) for s in range(self.seeds)], ignore_index=True)
        return table.assign(run_id="n" + table["size"] + "s" + table["seed"].astype(str))

    def unseen(self) -> dict[str, Array]:
        """Return two scales: at the middle of the table, and three times beyond it.

        Beyond an iso-FLOP table, three times the optimal size and data of its largest budget.
        """
        table = self.scales()
        beyond = 3 * table[["N", "D"]].max().to_numpy()
        if self.isoflop:
            flops = 9 * float(table["C"].max())
            n = np.exp(LOG_K + EXPONENT * np.log(flops))
            beyond = np.array([n, flops / (6 * n)])
        middle = np.exp(np.log(table[["N", "D"]]).mean().to_numpy())
        return dict(zip(("N", "D"), np.stack([middle, beyond], axis=1), strict=True))

    def codes(self, table: pd.DataFrame, group: str) -> Array:
        """Number the groups that rows (n,) belong to: a size's, a run's, or a budget's (of D; of C in iso-FLOP)."""
        column = {"size": "size", "run": "run_id", "budget": "C" if self.isoflop else "D"}[group]
        labels = table[column] if column != "C" and column != "D" else np.log(table[column]).round(6)
        return np.unique(labels, return_inverse=True)[1]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A design and what its rows share."""

    name: str
    design: Design
    errors: str
    """Name in `ERRORS`."""
    jitter: float | None = None
    """Standard deviation of ln N and ln D of a row about the grid, in a table of N, D, C and loss alone, as tables that
    were rounded or read off a figure; None: exact, with names of sizes and runs."""

    def measured(self, table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        """Return the table with losses measured once."""
        total = POINT_SD * rng.standard_normal(len(table))
        for group in ERRORS[self.errors]:
            codes = self.design.codes(table, group)
            total = total + SHARED_SD * rng.standard_normal(codes.max() + 1)[codes]
        if self.jitter is not None:
            n, d = (table[v] * np.exp(self.jitter * rng.standard_normal(len(table))) for v in ("N", "D"))
            table = pd.DataFrame({"N": n, "D": d, "C": 6 * n * d})
        clean = laws.CHINCHILLA.value({v: table[v].to_numpy() for v in ("N", "D")}, TRUTH)
        return table.assign(loss=clean * np.exp(total))

    @property
    def new_sd(self) -> float:
        """Standard deviation of ln loss of one point of a new size, run and budget."""
        return float(np.sqrt(POINT_SD**2 + len(ERRORS[self.errors]) * SHARED_SD**2))


DESIGNS = {
    "5 x 4": Design(sizes=5, budgets=4),
    "7 x 5": Design(sizes=7, budgets=5),
    "9 x 5": Design(sizes=9, budgets=5),
    "5 x 4 x 3": Design(sizes=5, budgets=4, seeds=3),
    "7 x 5 x 3": Design(sizes=7, budgets=5, seeds=3),
    "iso-FLOP 7 x 6": Design(sizes=7, budgets=6, isoflop=True),
    "7 x 5 at random D": Design(sizes=7, budgets=5, is_random=True),
}
"""Sizes x budgets (x seeds)."""


def cells(designs: Sequence[str], errors: Sequence[str], jitters: Sequence[float] = ()) -> list[Cell]:
    """Return every design with every kind of errors and jitter; runs that are sizes (one seed) are told once."""
    return [
        Cell(
            name=", ".join([name, shared, *([f"{100 * sd:g} %"] if jitters else [])]),
            design=DESIGNS[name],
            errors=shared,
            jitter=sd,
        )
        for name, shared, sd in itertools.product(designs, errors, jitters or [None])
        if shared != "run" or DESIGNS[name].seeds > 1
    ]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all simulations have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--tables", type=int, default=200, help="simulated tables a cell")
    found.add_argument("--design", choices=list(DESIGNS), nargs="*", default=list(DESIGNS))
    found.add_argument("--errors", choices=list(ERRORS), nargs="*", default=list(ERRORS))
    found.add_argument("--jitter", type=float, nargs="*", default=[], help="standard deviations of ln N and ln D")
    found.add_argument("--workers", type=int, default=1, help="processes")
    return found


def quick_minima() -> AbstractContextManager[object]:
    """Find minima to relative changes of 1e-7 in place of 1e-13, in half of the time: ends of intervals move by 1e-5 of
    themselves."""
    return patch.object(problem, "FINE", 1e-7)


def each_table(cell: Cell, num: int) -> Iterator[tuple[pd.DataFrame, np.random.Generator]]:
    """Yield the cell's scales and a generator, of the cell's own and the same for table i however many follow."""
    scales, of_cell = cell.design.scales(), crc32(cell.name.encode())
    for i in range(num):
        yield scales, np.random.default_rng([i, of_cell])


def run(job: Callable[[str, Cell, int], T], what: str, chosen: Sequence[Cell], num: int, workers: int) -> dict[str, T]:
    """Do a job for `num` tables of every cell, by the cell's name, and say on the standard error which are done."""
    done: dict[str, T] = {}
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(partial(job, what, num=num), chosen)
        for cell, each in zip(chosen, found, strict=True):
            done[cell.name] = each
            print(f"{what}, {len(done)} of {len(chosen)}: {cell.name}", file=sys.stderr, flush=True)
    return done


def markdown(columns: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Lay out columns of cells by row as a table; rows in the order in which they first appear."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(column.get(name, "") for column in columns.values())] for name in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
