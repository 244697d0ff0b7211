"""How often a sound table is accused: the share of simulated tables on which each flag and caution stands.

    python tests/experiments/false_alarms.py --workers 2 > false_alarms.md

The law is true and the errors are normal, so what speaks against the law or the table is a false alarm; at most 5 % of
tables are to show any one. What says that the rows cannot tell a parameter, or an error that points share, is printed
apart: it may be right of every table of a design. Flags are those of `aimscale fit` with the largest N and D held out
in turn (of an iso-FLOP table, the largest C).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from simulated_tables import Cell, cells, each_table, markdown, parser, run

from aimscale.analysis import fit
from aimscale.analysis.cli.laws import tested
from aimscale.analysis.display import Flag
from aimscale.analysis.fitting.held_out import held_out_cautions
from aimscale.analysis.fitting.problem import OBJECTIVES
from aimscale.analysis.fitting.result import Fit

CANNOT_TEST = "cannot test"
CAUTIONS = {"The": CANNOT_TEST, "Fitted": "no better than a line", "Only": "few inside"}
"""First word of a held-out test's caution -> its short name."""
HARMLESS = (
    *("few_values", "from_above", "factor", "reaches_bound", "lower_bound", "upper_bound"),
    *("one_variable", "collinear", "unseen", "few_groups"),
)
"""Kinds of flags that say what the rows cannot tell, and accuse nothing."""
MOST = 0.05
"""Share of sound tables that may show any one accusation."""
ANY = "any accusation"


def subject_class(flag: Flag) -> str:
    """Name what a flag is about: its subject without numbers; of a value, the variable that begins the sentence."""
    words = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "", flag.subject).strip(" =")
    first = str(flag).split()[0]
    return words or (first if flag.subject and first.isalpha() else "")


def shown(result: Fit) -> Iterator[str]:
    """Name the flags and cautions of a fit, each by kind and by kind and subject."""
    for flag in result.flags:
        yield flag.kind
        if subject := subject_class(flag):
            yield f"{flag.kind}: {subject}"
    for test in result.heldout:
        for caution in held_out_cautions([test]):
            yield f"held out {test.variable}: {CAUTIONS.get(caution.split()[0], caution)}"


def is_accusation(name: str) -> bool:
    """Tell whether a flag or caution speaks against the law or the table."""
    return not name.startswith(HARMLESS) and not name.endswith(CANNOT_TEST)


def measure(objective: str, cell: Cell, num: int) -> dict[str, float]:
    """Return the share of tables that show each flag and caution."""
    counts = Counter[str]()
    for scales, rng in each_table(cell, num):
        df = cell.measured(scales, rng)
        result = fit(df, "chinchilla", y="loss", objective=objective)
        names = set(shown(tested(result, df, ["C"] if cell.design.isoflop else ["N", "D"], None)))
        counts.update(names | ({ANY} if any(map(is_accusation, names)) else set()))
    return {name: count / num for name, count in counts.items()}


def table(shares: Mapping[str, Mapping[str, float]], *, accusing: bool) -> str:
    """Lay out per cent of tables, one row a cell and one column a flag, and the largest of each column."""
    names = sorted({name for found in shares.values() for name in found if is_accusation(name) == accusing})
    columns = {name: {cell: f"{100 * found.get(name, 0.0):.0f}" for cell, found in shares.items()} for name in names}
    for name in names:
        most = max(found.get(name, 0.0) for found in shares.values())
        columns[name]["most"] = f"{100 * most:.0f}{' !' * (accusing and name != ANY and most > MOST)}"
    return markdown(columns, "accusation" if accusing else "what rows cannot tell") if names else "(nothing)"


def main() -> None:
    """Print, by objective, per cent of sound tables that show each flag and caution; "!" marks more than 5 %."""
    options_of = parser(main.__doc__)
    options_of.add_argument("--objective", choices=list(OBJECTIVES), nargs="*", default=list(OBJECTIVES))
    options = options_of.parse_args()
    chosen = cells(options.design, options.errors)
    for objective in options.objective:
        shares = run(measure, objective, chosen, options.tables, options.workers)
        print(f"## {objective}\n\n{table(shares, accusing=True)}\n\n{table(shares, accusing=False)}\n", flush=True)


if __name__ == "__main__":
    main()
