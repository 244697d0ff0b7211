"""Formulas: arithmetic as numpy computes it, and nothing else, whatever the text."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.formulas import MAX_LENGTH, FormulaError, parse_formula
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.select import read_tables, select

VALUES = {"N": np.array([1e3, 2e3]), "D": np.array([5.0, 7.0]), "val/loss, last": np.array([2.0, 3.0]), "log": 4.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6 * N * D", 6 * VALUES["N"] * VALUES["D"]),
        ("-N**2/D + 1.5e3", -(VALUES["N"] ** 2) / VALUES["D"] + 1500),
        ("(N // 300) % 4", [3, 2]),
        ("exp(-`val/loss, last`) - abs(1 - D)", np.exp([-2, -3]) - [4, 6]),
        ("max(D, 6, N / 1e9) + min(D, 6)", [11, 13]),
        ("log10(N) + log2(8) + sqrt(log) + log(log)", np.log10(VALUES["N"]) + 5 + np.log(4)),
        ("10**12 * 10**12 * 10", 1e25),
        (" + ".join(["1"] * (MAX_LENGTH // 4)), MAX_LENGTH // 4),
    ],
)
def test_arithmetic_is_numpys(text, expected):
    np.testing.assert_allclose(parse_formula(text)(VALUES), expected, rtol=1e-15)
    assert parse_formula("N*D/N + `val/loss, last`").names == ("N", "D", "val/loss, last")


@pytest.mark.parametrize(
    "text",
    [
        "N.__class__.__init__.__globals__['sys'].modules['os'].system('touch made')", "N.to_csv('made')", "N[0]",
        "__import__('os').system('touch made')", "eval('1')", "@pd.read_pickle('made')", "f'{N}'", "'a' * 9", "N := 1",
        "[N for N in D]", "lambda: N", "N if D else N", "N < D", "N and D", "not N", "~N", "N | D", "N @ D", "(N, D)",
        "log(N, D)", "log(N, out=D)", "max(N)", "max(*N)", "log", "True", "None", "1j", "...", "x = N", "", "N D", "`N",
        "9**9**9", "1e999", "1/0", "9" * 400, "9" * (MAX_LENGTH + 1), "-" * 999 + "1", "(" * 400 + "1" + ")" * 400,
        "\0", "missing + N", "name * 2",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused_and_nothing_happens(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"N": [1.0, 2.0], "D": [3.0, 4.0], "name": ["a", "b"]}).to_csv("t.csv", index=False)
    with pytest.raises(FormulaError):
        parse_formula(text)({"N": [1.0, 2.0], "D": [3.0, 4.0], "name": ["a", "b"]})
    with pytest.raises(AnalysisError, match=r"t\.csv"):
        read_table("t.csv", {"L": text})
    with pytest.raises(AnalysisError):
        select(read_tables("t.csv"), [text])
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
