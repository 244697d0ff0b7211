"""What a user of `aimscale.analysis` sees: names that complete, results that show themselves, figures in a notebook."""

import doctest
import inspect
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale import analysis
from aimscale.analysis import display
from aimscale.analysis.plots.style import new_figure

DOCS = Path(__file__).parents[2] / "docs"


def test_names_complete_and_are_what_they_say():
    names = dir(analysis)
    assert {"fit", "held_out", "read_table", "contrast", "compare", "write_report", "laws"} <= set(names)
    for name in names:
        value = getattr(analysis, name)
        assert inspect.ismodule(value) == (name == "laws"), name
    with pytest.raises(AttributeError, match="attribute fitt"):
        _ = analysis.fitt


def test_results_show_and_draw_themselves(grid):
    result = analysis.fit(grid, "chinchilla")
    approaches = analysis.frontier(grid)
    results = [result, approaches]
    results += [analysis.held_out(result, grid, by="N"), analysis.correlate(grid, x="D", y="L")]
    for each in results:
        first, *rest = repr(each).splitlines()
        assert each.headline() == first
        assert 0 < len(rest) <= display.MAX_ROWS + 4
        assert "<table" in each._repr_html_()
        assert len(each.summary()) >= len(first)
    results[1:1] = [analysis.forecast(grid, {"N": 1e8, "D": 1e6}, law=["chinchilla"])]
    for each in results:
        assert isinstance(each.plot(), Figure)
    assert "x" in inspect.signature(type(result).plot).parameters  # help() shows the options
    assert "alpha" in repr(result)
    assert "array(" not in repr(result)
    with pytest.raises(analysis.AnalysisError, match="no figure of a"):
        display.Result().plot()


def test_ones_own_axes_stand_in_ones_own_figure(grid):
    figure, axes = new_figure(num_columns=2)
    result = analysis.fit(grid, "chinchilla")
    assert result.plot(ax=axes[1]) is figure
    assert isinstance(axes[1], Axes)
    assert np.size(axes[0].lines) == 0


def test_figures_are_drawn_once_in_a_notebook(grid):
    result = analysis.fit(grid, "chinchilla")
    assert {"summary", "plot", "table", "headline"} <= set(dir(result))
    result.plot()
    assert pyplot.get_fignums() == []  # else a notebook draws it a second time


@pytest.mark.slow
def test_every_public_function_says_what_it_returns_and_has_an_example_that_runs(grid, tmp_path, monkeypatch):
    for name in ("results", "more", "curves"):
        shutil.copyfile(DOCS / "figures/demo/results.parquet", tmp_path / f"{name}.parquet")
    names = {"params_total": "params", "images_seen": "images", "val_loss": "loss"}
    grid.rename(columns=names)[[*names.values()]].to_csv(tmp_path / "losses.csv")
    best = 3.0 * grid["params_total"] ** -0.5
    tried = [grid.assign(lr_peak=best * 2.0**k, val_loss=grid["val_loss"] * (1 + 0.01 * k**2)) for k in (-1, 0, 1)]
    pd.concat(tried).to_csv(tmp_path / "tuned.csv")
    tried = [grid.assign(recipe=name, val_loss=grid["val_loss"] * by) for name, by in (("old", 1.0), ("new", 0.98))]
    pd.concat(tried).to_csv(tmp_path / "two.csv")
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(analysis, name) for name in dir(analysis)} | {"pd": pd}
    for name in [name for name, value in public.items() if inspect.isfunction(value)]:
        text = inspect.getdoc(public[name])
        examples = doctest.DocTestParser().get_examples(text)
        assert examples, name
        assert "Returns:" in text or inspect.signature(public[name]).return_annotation == "Figure", name
        known = dict(public)
        for each in examples if name != "write_report" else ():  # which tests of the report call like this
            exec(each.source, known)
