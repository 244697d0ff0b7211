"""Optima of tuned settings, their laws, and regrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, flag_words, human, percent, scale_words, some
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Array, Columns, Law, Parameter, Params, coefficient
from aimscale.analysis.table.groups import EXACT
from aimscale.analysis.table.points import Points
from aimscale.analysis.table.schema import Exclusion
from aimscale.analysis.tuning.surface import Surface

MIN_VALUES = 3
"""Different values of a setting that show a cell's minimum."""
STEEPEST = 4.0
"""Exponents are searched between minus this and this."""
EXPONENTS = {"N": "a", "D": "b"}
"""Variable -> its exponent."""
OPTIMUM, EDGE, NO_MINIMUM, BY_LAW, UNKNOWN = "inside", "edge", "no minimum", "by the law", "not known"
"""How a cell's optimum was found: inside the settings tried or as near as its error, beyond, not at all, by the law."""
NO_OPTIMUM = {
    EDGE: "The best setting lies beyond those that were tried at {}: try further ones; the laws leave it out.",
    NO_MINIMUM: "No lowest loss is seen at {}; the laws leave it out.",
}
"""Why a tried cell has no optimum -> caution."""
WORTH_SAYING = 1e-3
"""Regret below which a run counts as tuned: about what two seeds of one run differ by."""
NOT_TOLD = 0.1
"""Upper end of a regret from which nothing is known of the tuning."""
ONE_RATE = "learning rates were not swept, so tuning cannot be checked"
"""Verdict on a table in which no size has several rates."""
MOST = 0.8
"""Advice takes the cheapest runs that take away this share of the error that any can."""
MULTIPLIER = "lr_multiplier"
"""Column of the factor on a recipe's learning rate."""
RECIPE_KEYS = {"lr": "lr_peak", "batch": "batch_size"}
"""Setting -> key of a recipe."""
SETTING_WORDS = {"lr": "learning rate", "batch": "batch"}


def _product(x: Columns, t: Params, *, variables: tuple[str, ...]) -> tuple[Array]:
    return (np.exp(sum(t[EXPONENTS[v]] * (x.log(v) - np.log(t[f"{v}0"])) for v in variables)),)


def _product_report(p: Params, *, variables: tuple[str, ...]) -> dict[str, Array]:
    powers = {EXPONENTS[v]: p[EXPONENTS[v]] for v in variables}
    return {"c": p["c"] * np.prod([p[f"{v}0"] ** -p[EXPONENTS[v]] for v in variables], axis=0), **powers}


def product(*variables: str) -> Law:
    """Make y = c N^a D^b, with exponents of either sign, in N, D or both."""
    return Law(
        name="product",
        formula=f"y = {' '.join(['c', *(f'{v}^{EXPONENTS[v]}' for v in variables)])}",
        variables=variables,
        linear=(coefficient("c"),),
        nonlinear=tuple(Parameter(name=EXPONENTS[v], bounds=(-STEEPEST, STEEPEST)) for v in variables),
        basis=partial(_product, variables=variables),
        report=partial(_product_report, variables=variables),
        constants={f"{v}0": 1.0 for v in variables},
        source="Li et al. 2025 (Step Law), of learning rate and batch",
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Rates(Result):
    """Best learning rate (and batch) by size and data, their laws, and what was lost by others."""

    table: pd.DataFrame
    """A row per cell: N, D, num_rows; of each setting _used (of the lowest loss), _tried (how many), _best, _lo, _hi;
    found; regret, regret_lo, regret_hi (shares of the loss); loss, the lowest."""
    laws: dict[str, Fit]
    """Setting (lr, batch) -> law of its optimum; missing where too few cells have one."""
    surface: Surface = field(repr=False)
    tuned: Array = field(repr=False)
    """Numbers of the cells that the surface describes."""
    points: Points = field(repr=False)
    """The rows that were used: N, D, settings, y, and the number of their cell."""

    also = ("columns", "exclusions", "names")

    @property
    def columns(self) -> dict[str, str]:
        """N, D, the settings and y -> column as the file calls it."""
        return {key: self.points.rows.called(name) for key, name in self.points.columns.items()}

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """Rows left out."""
        return self.points.exclusions

    @property
    def names(self) -> dict[str, str]:
        """Column -> its name in the file, where `--columns` renamed it."""
        return self.points.rows.names

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings that were tuned: lr, or lr and batch."""
        return tuple(name for name in SETTING_WORDS if name in self.columns)

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Cells whose optimum was not found."""
        out = list[Flag]()
        for kind, text in NO_OPTIMUM.items():
            if len(rows := self.table[self.table["found"] == kind]):
                where = some([scale_words(each, 3) for each in rows[["N", "D"]].to_dict("records")])
                out.append(Flag(kind=kind, number=len(rows), text=text.format(where)))
        first = next(iter(self.laws.values()), None)  # laws of several settings have the same cells
        return (*out, *(flag for flag in (first.flags if first else ()) if flag.kind in ("unseen", "few_groups")))

    def verdict(self) -> str:
        """Say in one line whether the largest size was tuned, by its longest run."""
        top = self.table.sort_values(["N", "D"]).iloc[-1]
        if not np.isfinite(top["regret_hi"]):
            return "not known: the largest size has too few rates, and no law says which is best"
        if top["regret_lo"] > 0 and top["regret"] > WORTH_SAYING:
            return f"the largest size lost {_regret_words(top)} of its loss to its setting"
        if not top["regret_hi"] < NOT_TOLD:
            return f"not known: these rates allow the largest size a loss of up to {percent(top['regret_hi'])}"
        return f"the largest size is tuned within {percent(max(float(top['regret_hi']), WORTH_SAYING))} of its loss"

    def _law_words(self, name: str) -> str:
        law = self.laws[name]
        powers = [
            f"{variable}^{law.params[exponent]:.3f} {law.intervals[exponent].words('.3f')}"
            for variable, exponent in EXPONENTS.items()
            if exponent in law.params
        ]
        return f"best {SETTING_WORDS[name]} {' '.join(['~', *powers])}"

    def advice(self, target: Mapping[str, float]) -> str:
        """Say the best settings at a target, and at which further sizes and data rates would tell them best."""
        if lost := [v for v in ("N", "D") if v not in target]:
            raise AnalysisError(f"The target needs {' and '.join(lost)}, as in N=1e9,D=2B.")
        at, table, parts = pd.DataFrame([target]), self.table, list[str]()
        axes = [np.unique(np.append(table[v], 2 * table[v].max())) for v in ("N", "D")]
        tuned = pd.MultiIndex.from_frame(table.loc[table["found"] == OPTIMUM, ["N", "D"]])
        new = pd.MultiIndex.from_product(axes, names=["N", "D"]).difference(tuned).to_frame(index=False)
        new = new[new["N"] * new["D"] < target["N"] * target["D"]]
        for name, law in self.laws.items():
            value, low, high = law.predict(at)[["value", "pi_lo", "pi_hi"]].iloc[0]
            words = f"best {SETTING_WORDS[name]} {human(value)} [{human(low)}, {human(high)}]"
            if len(new):
                estimate = law.estimate
                law_there, here = (estimate.law_at(law.variables(each)) for each in (at, new))
                before, after = estimate.error_with_more_data(law_there, here, estimate.components.total)
                nearly = new.assign(error=after)[before - after >= MOST * (before - after).max()]
                best = nearly.loc[(nearly["N"] * nearly["D"]).idxmin()]
                where = scale_words(best[["N", "D"]].to_dict(), 3)
                words += f"; {MIN_VALUES} values of it at {where} tell most for their compute: "
                words += f"its standard error falls from {percent(before)} to {percent(best['error'])}"
            parts.append(words)
        return "; ".join(parts) or "not known: no law of the best settings"

    def recipe(self, source: str) -> str:
        """Write the laws as a recipe that a sweep can name, in YAML; the rest is as in recipe `small`."""
        if self.columns["lr"] == MULTIPLIER or "lr" not in self.laws:
            raise AnalysisError(
                "A recipe needs a law of the learning rate itself: three rates at several sizes or budgets."
            )
        table = self.table
        ranges = ", ".join(f"{v} {human(table[v].min())} to {human(table[v].max())}" for v in ("N", "D"))
        lines = ["summary: best settings by size and data, fitted by aimscale rates", "like: small"]
        for name, law in self.laws.items():
            params, at = law.estimate.params, {v: round(law.law.constants[f"{v}0"]) for v in law.law.variables}
            powers = {v: params[EXPONENTS[v]] for v in at}
            value = float(np.exp(law.estimate.value_of(law.estimate.law_at(at))[0]))
            keys = {"coefficient": f"{value:.6g}", **{v: f"{power:.4g}" for v, power in powers.items()}}
            keys["at"] = f"{{{', '.join(f'{v}: {number}' for v, number in at.items())}}}"
            keys["source"] = json.dumps(f"{source}: {law.num_points} best settings, {ranges}")
            lines += [f"{RECIPE_KEYS[name]}:", *(f"  {key}: {text}" for key, text in keys.items())]
        return "\n".join([*lines, ""])

    def facts(self) -> list[tuple[str, str]]:
        """Return cautions, the verdict and the laws."""
        facts = [("caution", text) for text in flag_words(self.flags)]
        facts.append(("tuning", self.verdict()))
        facts += [("law", self._law_words(name)) for name in self.laws]
        if not self.laws:
            facts.append(("law", "none: too few best settings lie inside those that were tried, or all are the same"))
        if self.columns["lr"] == MULTIPLIER and "lr" in self.laws and "a" in self.laws["lr"].intervals:  # muP's claim
            ends = self.laws["lr"].intervals["a"]
            held = "not refuted" if ends.low <= 0 <= ends.high else "refuted"
            text = f"that the recipe's rate suits every size alike (exponent of N 0) is {held}: {ends.words()}"
            facts.append(("transfer", text))
        scatter = f"{percent(self.surface.noise)} about parabolas with {self.surface.degrees} degrees of freedom"
        facts.append(("scatter", scatter))
        return facts + [("left out", "; ".join(map(str, self.exclusions)))] * bool(self.exclusions)

    def cells(self) -> list[dict[str, str]]:
        """Write a row per cell."""
        out = list[dict[str, str]]()
        for _, row in self.table.sort_values(["N", "D"]).iterrows():
            cell = {"N": human(row["N"]), "D": human(row["D"])}
            for name in self.settings:
                cell[name] = human(row[f"{name}_used"])
                best, low, high = (row[f"{name}_{end}"] for end in ("best", "lo", "hi"))
                cell[f"best {name}"] = f"{human(best)} [{human(low)}, {human(high)}]" if np.isfinite(best) else ""
            out.append(cell | {"found": row["found"], "lost": _regret_words(row)})
        return out


def scale_of(table: pd.DataFrame) -> Array:
    """Return 1 and the centred ln N and ln D of cells (cells, q), those that vary."""
    logs = np.log(table[["N", "D"]].to_numpy(float))
    return np.column_stack([np.ones(len(logs)), (logs - logs.mean(axis=0))[:, np.ptp(logs, axis=0) > EXACT]])


def _regret_words(row: pd.Series) -> str:
    """Write a regret with its interval, in per cent of the loss."""
    if not np.isfinite(row["regret"]):
        return ""
    value, low, high = (f"{100 * row[name]:.2f}" for name in ("regret", "regret_lo", "regret_hi"))
    return f"{value} %" if not np.isfinite(row["regret_hi"]) else f"{value} % [{low}, {high}]"
