"""Correlations, contrasts and noise hold the truth too, and the command prints a table of every study."""

import pandas as pd
import pytest

from aimscale.analysis.coverage import __main__ as command
from aimscale.analysis.coverage.designs import Design
from aimscale.analysis.coverage.others import contrast_coverage, correlation_coverage, forecast_coverage, noise_coverage


@pytest.mark.parametrize("study", [correlation_coverage, contrast_coverage, noise_coverage])
@pytest.mark.parametrize("errors", ["run", "size"])
def test_intervals_cover(study, errors):
    found = study(Design(sizes=5, budgets=4, seeds=3, errors=errors), 40).table()
    assert (found["coverage"] >= 0.85).all()


@pytest.mark.slow
def test_two_step_forecasts_cover():
    found = forecast_coverage(Design(sizes=7, budgets=5, seeds=1, errors="run"), 30).table()
    assert (found["coverage"] >= 0.83).all()


def test_the_command_prints_a_row_an_interval_and_goes_on_where_it_was_cut_off(monkeypatch, capsys, tmp_path):
    keep = tmp_path / "coverage.csv"
    monkeypatch.setattr("sys.argv", ["coverage", "--tables", "2", "--only", "contrast", "--keep", str(keep)])
    monkeypatch.setattr(command, "verdict_coverage", lambda tables: noise_coverage(command.GRIDS[2], 2))
    command.main()
    assert "| contrast | " in capsys.readouterr().out
    kept = pd.read_csv(keep)
    kept.iloc[:3].assign(coverage=0.77).to_csv(keep, index=False)
    command.main()
    assert capsys.readouterr().out.count("| 77 / ") == 3
    again = pd.read_csv(keep)
    assert (again["coverage"].iloc[:3] == 0.77).all()
    pd.testing.assert_frame_equal(again.iloc[3:], kept.iloc[3:])
    monkeypatch.setattr("sys.argv", ["coverage", "--tables", "3", "--only", "contrast", "--keep", str(keep)])
    command.main()  # of another number of tables: nothing kept serves
    assert "| 77 / " not in capsys.readouterr().out
    assert set(pd.read_csv(keep)["asked"]) == {2, 3}
