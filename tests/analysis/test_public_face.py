"""What a user of `aimscale.analysis` sees: names that complete, results that show themselves, figures in a notebook."""

import inspect
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nbclient import NotebookClient

from aimscale import analysis
from aimscale.analysis import display
from aimscale.analysis.plots.style import new_figure


def test_names_complete_and_are_what_they_say():
    names = dir(analysis)
    assert {"fit", "held_out", "read_table", "noise", "contrast", "compare", "write_report", "laws"} <= set(names)
    for name in names:
        value = getattr(analysis, name)
        assert inspect.ismodule(value) == (name == "laws"), name
    with pytest.raises(AttributeError, match="attribute fitt"):
        _ = analysis.fitt


def test_importing_it_stays_light():
    code = "import sys, aimscale.analysis; print([m for m in ('pandas', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_show_and_draw_themselves(grid):
    result = analysis.fit("chinchilla", grid, resamples=40)
    approaches = analysis.all_approaches(grid, resamples=40)
    results = [result, approaches, approaches.frontiers[-1]]
    results += [analysis.held_out(result, grid, by="N", resamples=40), analysis.correlate(grid, x="D", y="L")]
    for each in results:
        first, *rest = repr(each).splitlines()
        assert each.headline() == first
        assert 0 < len(rest) <= display.MAX_ROWS + 4
        assert "<table" in each._repr_html_()
        assert len(each.summary()) >= len(first)
    for each in results[:2]:
        assert isinstance(each.plot(), Figure)
    assert "alpha" in repr(result)
    assert "array(" not in repr(result)
    with pytest.raises(analysis.AnalysisError, match="no figure of a"):
        results[4].plot()


def test_ones_own_axes_stand_in_ones_own_figure(grid):
    figure, axes = new_figure(num_columns=2)
    result = analysis.fit("chinchilla", grid, resamples=0)
    assert result.plot(ax=axes[1]) is figure
    assert isinstance(axes[1], Axes)
    assert np.size(axes[0].lines) == 0


def test_a_notebook_shows_tables_and_figures(grid, tmp_path):
    grid.to_csv(tmp_path / "results.csv", index=False)
    cells = [
        "from aimscale.analysis import fit, laws, read_table, noise, all_approaches\ncallable(noise)",
        "result = fit(laws.CHINCHILLA, read_table('results.csv'), resamples=40)\nresult",
        "result.plot()",
        "all_approaches(read_table('results.csv'), resamples=40)",
        "get_ipython().kernel.do_complete('result.su', 9)['matches']",
        "from aimscale import analysis\nget_ipython().kernel.do_complete('analysis.held', 13)['matches']",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    callable_, table, figure, frontier, method, name = (cell.outputs[-1].data for cell in notebook.cells)
    assert callable_["text/plain"] == "True"
    assert "<table" in table["text/html"]
    assert "E + A N^-alpha" in table["text/plain"]
    assert len(figure["image/png"]) > 5000
    assert sum(len(cell.outputs) for cell in notebook.cells) == len(cells)  # one picture, not two
    assert "<table" in frontier["text/html"]
    assert "summary" in method["text/plain"]
    assert "held_out" in name["text/plain"]
