"""Figures draw what they are given: the points, the law, its interval; readable in grey; safe with hostile names."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from commands import refused, say
from matplotlib.backends.backend_agg import FigureCanvasAgg

from aimscale import analysis
from aimscale.analysis import correlate, fit
from aimscale.analysis.display import human
from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.optimum.approaches import frontier
from aimscale.analysis.plots.accuracy import plot_accuracy, plot_contrasts, plot_loss_accuracy
from aimscale.analysis.plots.scaling import plot_approaches, plot_fit, plot_points
from aimscale.analysis.plots.style import DOUBLE, axis_label, inline_svg, log_axis, new_figure, save, styled


@pytest.fixture
def joint(grid):
    return fit(grid, "chinchilla")


@pytest.fixture
def probes(grid):
    rows = grid.assign(task="dig$its", kind="linear", top1=0.9 - 0.1 * grid["val_loss"], chance=0.1)
    return rows.assign(top1_lo95=rows["top1"] - 0.02, top1_hi95=rows["top1"] + 0.03)


def law_lines(ax):
    """The lines of a law: without those of points, and without those of a legend."""
    return [line for line in ax.lines if len(line.get_xdata()) and line.get_linestyle() != "None"]


def marks(ax):
    """The points that are drawn as markers, an array a series."""
    return [line.get_xydata() for line in ax.lines if len(line.get_xdata()) and line.get_linestyle() == "None"]


def test_units_are_named_for_our_tables_only(grid):
    (ours,) = plot_points(grid.assign(target="normalised"), "params_total").axes
    assert ours.get_ylabel() == "validation loss\n(normalised MSE)"
    assert "pixel head" in ours.get_xlabel()
    setup = json.dumps({"objective.penalty": "smooth_l1"})  # a field that a user added
    (changed,) = plot_points(grid.assign(target="normalised", setup=setup), "params_total").axes
    assert changed.get_ylabel() == "validation loss"
    (raw,) = plot_fit(fit(grid.assign(target="raw"), "chinchilla"), x="D").axes
    assert (raw.get_ylabel(), raw.get_xlabel()) == ("validation loss\n(MSE)", "D: training images seen")
    (theirs,) = plot_fit(fit(grid, "chinchilla"), x="D").axes
    assert (theirs.get_ylabel(), theirs.get_xlabel()) == ("validation loss", "D: samples seen")


def test_legends_lie_within_their_figure_and_beside_each_other(grid, probes):
    spread = np.resize([0.9, 1.0, 1.1], len(grid))  # so that budgets are ranges: "90k-110k"
    rows, accuracies = (each.assign(images_seen=grid["images_seen"] * spread) for each in (grid, probes))
    for figure in (plot_fit(fit(rows, "chinchilla"), x="N"), plot_accuracy(accuracies)):
        FigureCanvasAgg(figure).draw()
        boxes = [each.get_window_extent() for each in figure.legends]
        assert boxes
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_labels_replace_names_on_axes_and_legends(joint, grid, known_study, tmp_path):
    labels = {"N": "Parameters", "images_seen": "Images", "L": "Loss ($)"}
    (ax,) = (figure := joint.plot(labels=labels)).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Parameters", r"Loss (\$)")
    assert figure.legends[0].get_title().get_text() == "Images"
    (ax,) = plot_points(grid, "D", labels={"D": "Images"}).axes
    assert ax.get_xlabel() == "Images"
    (ax,) = frontier(grid).plot(labels={"N": "Best size", "C": "FLOPs"}).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("FLOPs", "Best size")
    part = {"sizes": ["s3"], "budgets": [8000]}
    found = contrast(known_study(part, part | {"prefix": "none"}), by="prefix")
    figure = found.plot(labels={"val_loss": "Loss", "none": "causal", "prefix": "Attention"})
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["Loss"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["causal"]
    assert figure.legends[0].get_title().get_text() == "Attention"
    grid.to_csv(tmp_path / "grid.csv")
    options = ["fit", tmp_path / "grid.csv", "--figure", tmp_path / "law", "--label"]
    say(*options, "N=Parameters, all of them")
    assert (tmp_path / "law.pdf").is_file()
    for wrong, words in (("N", "not 'N'"), ("M=Sizes", "--label M: no axis")):
        assert words in refused(*options, wrong)
    assert "add --figure" in refused("fit", tmp_path / "grid.csv", "--label", "N=Parameters")


def test_points_are_told_apart_by_letters_and_by_words(grid):
    named = grid.assign(size="n" + grid["params_total"].map("{:.0f}".format))
    (legend,) = plot_points(named, "D", by="size").legends
    assert [text.get_text() for text in legend.get_texts()] == list(named["size"].unique())
    with pytest.raises(AnalysisError, match="no column 'C2'"):
        plot_points(grid, "C2")


def test_another_variable_than_the_laws_is_refused_by_name(joint):
    with pytest.raises(AnalysisError, match="has no variable 'C'; give x one of N, D"):
        joint.plot(x="C")


def test_the_law_is_drawn_where_it_predicts(joint):
    (ax,) = plot_fit(joint, x="N").axes
    budgets = np.sort(joint.data["D"].unique())
    lines = law_lines(ax)
    assert len(lines) == len(budgets)
    for line, budget in zip(lines, budgets, strict=True):
        n, loss = line.get_data()
        expected = joint.predict({"N": n, "D": np.full(len(n), budget)})["value"]
        np.testing.assert_allclose(loss, expected)
    drawn = np.concatenate(marks(ax))
    measured = joint.data[["N", "y"]].to_numpy()
    assert {tuple(point) for point in measured} <= {tuple(point) for point in drawn}
    assert len({str(line._dash_pattern) for line in lines}) >= 4
    assert "parameters" in ax.get_xlabel()
    assert "loss" in ax.get_ylabel()


def test_residuals_are_the_measurements_over_the_law(joint):
    (ax,) = joint.plot(x="D", kind="residuals").axes
    data = joint.data
    expected = np.column_stack([data["D"], 100 * (data["y"] / data["fitted"] - 1)])
    drawn = np.concatenate(marks(ax))
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
    with pytest.raises(AnalysisError, match="kind='residuals', not 'resid'"):
        joint.plot(kind="resid")


def test_two_laws_on_one_axes_are_told_apart(joint, grid):
    other = fit(grid.assign(val_loss=2 * grid["val_loss"]), "kaplan")
    figure = joint.plot(x="N", label="mine")
    (ax,) = figure.axes
    assert other.plot(ax=ax, x="N", color="red") is figure
    own = [str(handle.get_color()) for handle in figure.legends[0].get_lines()]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "kaplan"]
    assert {str(line.get_color()) for line in law_lines(ax)} == {own[0], "red"}
    low, high = ax.get_ylim()
    assert low < grid["val_loss"].min() < 2 * grid["val_loss"].max() < high


def test_what_a_user_has_set_stays(joint):
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 20, "axes.labelsize": 21, "axes.prop_cycle": mpl.cycler(color=["#123456"])}):
        (ax,) = joint.plot(x="N", label="mine").axes
    assert ax.xaxis.label.get_size() == 21
    assert {line.get_color() for line in law_lines(ax)} == {"#123456"}
    assert dict(mpl.rcParams) == before


def test_a_forecast_is_drawn_from_the_table_to_its_scales(grid):
    found = analysis.forecast(grid, {"N": 1e8, "D": 1e7}, law=["chinchilla", "kaplan"])
    (ax,) = found.plot().axes
    assert len(marks(ax)[0]) == len(grid)
    path = law_lines(ax)[0].get_xydata()
    assert path[-1, 1] == pytest.approx(found.table["value"].iloc[0])
    assert path[0, 0] == pytest.approx(grid["flops_train"].max())
    lowest, highest = (line.get_ydata() for line in law_lines(ax) if line.get_linestyle() == ":")
    assert (lowest <= path[:, 1] * 1.001).all()
    assert (highest >= path[:, 1] * 0.999).all()


def test_every_figure_leaves_in_every_format(joint, grid, probes, tmp_path):
    links = {"dig$its": correlate(probes, x="val_loss", y="top1")}
    figures = {
        "fit": plot_fit(joint, x="D"),
        "points": plot_points(grid, "params_total", by="images_seen"),
        "accuracy": plot_loss_accuracy(probes, links),
        "frontier": plot_approaches(frontier(grid)),
    }
    for name, figure in figures.items():
        svg, pdf, png = save(figure, tmp_path / name)
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        assert pdf.read_bytes().startswith(b"%PDF")
        assert png.read_bytes().startswith(b"\x89PNG")
    again = save(plot_fit(joint, x="D"), tmp_path / "again")
    assert again[0].read_bytes() == (tmp_path / "fit.svg").read_bytes()


def test_the_page_rounds_places_and_no_texts(grid):
    figure = plot_points(grid.assign(val_loss=np.linspace(0.30, 0.31, len(grid))), "params_total")
    svg = inline_svg(figure, "close", "losses")
    texts = {each.text for each in ElementTree.fromstring(svg.replace("xlink:", "")).iter() if each.text}
    ticks = {
        label.get_text() for label in figure.axes[0].get_yticklabels() if re.fullmatch(r"0\.30\d", label.get_text())
    }
    assert len(ticks) >= 3
    assert ticks <= texts
    assert not re.search(r"\d\.\d{3}[^<>]*>", svg)


def test_figures_of_one_page_share_no_id_and_let_the_page_show_behind_them(joint):
    figure = plot_fit(joint)
    first, second = (inline_svg(figure, key, 'a "label" & <more>') for key in ("one", "two"))
    root = ElementTree.fromstring(first.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'a "label" & <more>'
    (behind,) = re.findall(r'id="one-patch_1">\s*<path [^>]*class="([^"]+)"', first)
    assert f".{behind} {{fill: none}}" in first
    ids = [
        {e.attrib["id"] for e in ElementTree.fromstring(t.replace("xlink:", "")).iter() if "id" in e.attrib}
        for t in (first, second)
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_numbers_read_as_people_say_them():
    shown = [human(v) for v in (27_648, 1.209e9, 999_999, 3.5e21, 0.0123, 0, np.nan)]
    assert shown == ["27.6k", "1.21B", "1M", "3.5×10²¹", "0.0123", "0", "–"]


def test_many_points_are_all_drawn_and_make_no_large_page():
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(10, 18, (2, 100_000))).round(-3) + 1
    many = pd.DataFrame({"params_total": n, "images_seen": rng.choice([1e4, 1e5, 1e6], len(n))})
    many["val_loss"] = 0.2 + 30 * n**-0.4 + 3 / np.sqrt(d)
    figure = plot_points(many, "params_total", by="images_seen")
    assert sum(map(len, marks(figure.axes[0]))) == len(many)
    assert len(inline_svg(figure, "many", "losses")) < 300_000


def test_an_axis_of_a_computed_column_reads_as_words():
    assert axis_label("images_seen", names={"images_seen": "`Tokens (B)`*1e9"}) == "D: Tokens (B) × 1e9"


@pytest.mark.parametrize("column", ["params_total", "flops_train"])
@pytest.mark.parametrize("decades", [0.01, 0.59, 0.61, 1.41, 2.21, 14])
def test_labels_of_ticks_never_touch(decades, column):
    with styled():
        figure, axes = new_figure(DOUBLE, 2.0, 1, 3)
        for start, ax in zip((8.2e4, 1.05e5, 3e6), axes, strict=True):
            log_axis(ax, "x", [start, start * 10**decades], column)
        figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in axes:
        low, high = ax.get_xlim()
        ticks = [tick.label1 for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [text.get_window_extent(renderer) for text in ticks]
        assert len(boxes) >= 2
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_accuracy_against_each_scale_has_points_intervals_lines_and_chance(grid, probes):
    probes = pd.concat(probes.assign(task=task) for task in ("digits", "pets"))
    inside = round(float(probes["top1"].median()), 4)
    probes["chance"] = probes["task"].map({"digits": 0.1, "pets": inside})
    figure = plot_accuracy(probes)
    num_budgets = grid["images_seen"].nunique()
    for ax, num_series in zip(figure.axes, 2 * [num_budgets, 6, 6], strict=True):
        assert len(marks(ax)) == num_series
        assert sum(map(len, marks(ax))) == len(grid)
        bars = [line.get_ydata() for line in law_lines(ax) if np.isnan(line.get_ydata()).any()]
        np.testing.assert_allclose(np.concatenate([bar[1::3] - bar[::3] for bar in bars]), 0.05)
    means = [line for line in law_lines(figure.axes[2]) if len(line.get_xdata()) == num_budgets]
    assert len(means) == 6
    chances = [{line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"} for ax in figure.axes]
    assert chances == 3 * [set()] + 3 * [{inside}]
    assert figure.axes[3].get_title(loc="left") == f"pets (chance {100 * inside:.1f} %)"
    assert figure.axes[0].get_title(loc="left") == "digits (chance 10.0 %)"
    assert min(ax.get_ylim()[0] for ax in figure.axes) > 0.5


def test_baselines_are_lines_across_the_panels_of_their_task(probes):
    probes = pd.concat(probes.assign(task=task) for task in ("digits", "pets"))
    levels = pd.DataFrame({"task": ["digits", "pets", "pets"], "name": ["raw-pixels", "random", "aim-7B"]})
    figure = plot_accuracy(probes, levels.assign(top1=[0.8, 0.81, 0.99]))
    named = [[text.get_text() for text in figure.axes[i].get_legend().get_texts()] for i in (2, 5)]
    assert named == [["raw-pixels 80.0"], ["↑ aim-7B 99.0", "random 81.0"]]
    assert {ax.get_ylim()[1] < 0.95 for ax in figure.axes} == {True}


def test_every_measure_of_a_contrast_is_named(known_study):
    part = {"sizes": ["s3", "s4"], "budgets": [8000]}
    df = known_study(part, part | {"patch_order": "spiral"})
    probes = [[{"task": "t", "kind": kind, "n": 100, "top1": 0.5}] for kind in ("knn", "linear")]
    df = df.assign(probes=[probes[0] + probes[1]] * len(df))
    found = contrast(df, by="patch_order")
    figure = plot_contrasts(found)
    titles = [each.measure.title for each in found.contrasts]
    shown = [text.get_text() for ax in figure.axes for text in ax.get_yticklabels()]
    assert sorted(shown) == sorted(titles)
