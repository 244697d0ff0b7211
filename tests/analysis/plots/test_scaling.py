"""Figures draw what they are given: the points, the law, its interval; readable in grey; safe with hostile names."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import correlate, fit
from aimscale.analysis.frontier.approaches import all_approaches
from aimscale.analysis.plots.scaling import plot_approaches, plot_fit, plot_loss_accuracy, plot_points
from aimscale.analysis.plots.style import DARK, human, log_axis, new_figure, save, svg_text, themed_svg


@pytest.fixture
def joint(grid):
    return fit("chinchilla", grid, resamples=60)


def drawn_lines(ax):
    """Lines that have points: those of a legend have none."""
    return [line for line in ax.lines if len(line.get_xdata())]


def test_units_are_named_for_our_tables_only(grid):
    (ours,) = plot_points(grid.assign(target="normalised"), "params_total").axes
    assert ours.get_ylabel() == "validation loss (normalised MSE)"
    assert "pixel head" in ours.get_xlabel()
    (raw,) = plot_fit(fit("chinchilla", grid.assign(target="raw"), resamples=0), x="D").axes
    assert (raw.get_ylabel(), raw.get_xlabel()) == ("validation loss (MSE)", "D: training images seen")
    (theirs,) = plot_fit(fit("chinchilla", grid, resamples=0), x="D").axes
    assert (theirs.get_ylabel(), theirs.get_xlabel()) == ("validation loss", "D: samples seen")


def test_the_law_is_drawn_where_it_predicts(joint):
    (ax,) = plot_fit(joint, x="N").axes
    budgets = np.sort(joint.data["D"].unique())
    lines = drawn_lines(ax)
    assert len(lines) == len(budgets)
    for line, budget in zip(lines, budgets, strict=True):
        n, loss = line.get_data()
        expected = joint.predict({"N": n, "D": np.full(len(n), budget)})["value"]
        np.testing.assert_allclose(loss, expected)
    drawn = np.concatenate([points.get_offsets() for points in ax.collections if len(points.get_offsets()) > 0])
    measured = joint.data[["N", "y"]].to_numpy()
    assert {tuple(point) for point in measured} <= {tuple(point) for point in drawn}
    assert len({str(line._dash_pattern) for line in lines}) >= 4
    assert "parameters" in ax.get_xlabel()
    assert "loss" in ax.get_ylabel()


def test_every_figure_renders_to_svg_and_png(joint, grid, tmp_path):
    approaches = all_approaches(grid, resamples=40)
    probes = grid.assign(task="dig$its", kind="linear", top1=0.9 - 0.5 * grid["val_loss"], chance=0.1)
    probes = probes.assign(top1_lo95=probes["top1"] - 0.02, top1_hi95=probes["top1"] + 0.02)
    links = {"dig$its": correlate(probes, x="val_loss", y="top1")}
    figures = {
        "fit": plot_fit(joint, x="D"),
        "points": plot_points(grid, "params_total", by="images_seen"),
        "accuracy": plot_loss_accuracy(probes, links),
        "frontier": plot_approaches(approaches),
    }
    for name, figure in figures.items():
        svg, png = save(figure, tmp_path / name)
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        assert png.read_bytes().startswith(b"\x89PNG")
    assert svg_text(plot_fit(joint)) == svg_text(plot_fit(joint))


def test_themed_svg_has_no_fixed_colour_and_unique_ids(joint):
    figure = plot_fit(joint)
    first, second = (themed_svg(figure, key, 'a "label" & <more>') for key in ("one", "two"))
    root = ElementTree.fromstring(first.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'a "label" & <more>'
    for colour in DARK:
        assert colour not in first
    ids = [
        {e.attrib["id"] for e in ElementTree.fromstring(t.replace("xlink:", "")).iter() if "id" in e.attrib}
        for t in (first, second)
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_numbers_read_as_people_say_them():
    shown = [human(v) for v in (27_648, 1.209e9, 999_999, 3.5e21, 0.0123, 0, np.nan)]
    assert shown == ["27.6k", "1.21B", "1M", "3.5×10²¹", "0.0123", "0", "–"]


@pytest.mark.parametrize("span", [(0.30, 0.31), (0.2, 0.5), (2.57, 7.8), (1e3, 1e4), (1e4, 1e10), (5, 5)])
def test_log_axes_have_a_few_ticks_inside(span):
    _, (ax,) = new_figure()
    log_axis(ax, "y", span)
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert (1 if span == (5, 5) else 3) <= len(ticks) <= 10


def test_a_hundred_thousand_points_become_an_image_in_the_figure(joint):
    rng = np.random.default_rng(0)
    many = pd.DataFrame({"params_total": rng.lognormal(14, 2, 100_000)})
    many["val_loss"] = 0.2 + 30 * many["params_total"] ** -0.4
    svg = svg_text(plot_points(many, "params_total"))
    assert len(svg) < 1_500_000
    assert "<image" in svg


def test_accuracy_axes_start_where_the_data_are(grid):
    probes = grid.assign(task="digits", kind="linear", top1=0.9 - 0.1 * grid["val_loss"], chance=0.1)
    probes = probes.assign(top1_lo95=probes["top1"] - 0.01, top1_hi95=probes["top1"] + 0.01)
    axes = plot_loss_accuracy(probes, {}).axes
    assert axes[0].get_ylim()[0] > 0.7


def test_unidentified_laws_still_draw(joint):
    bare = dataclasses.replace(joint, draws={}, intervals={})
    assert len(drawn_lines(plot_fit(bare).axes[0])) == joint.data["D"].nunique()
