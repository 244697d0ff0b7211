"""Figures draw what they are given: the points, the law, its interval; readable in grey; safe with hostile names."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import ImageColor

from aimscale.analysis import correlate, fit
from aimscale.analysis.frontier.approaches import all_approaches
from aimscale.analysis.frontier.measured import isoflop_points
from aimscale.analysis.frontier.optimum import points_of
from aimscale.analysis.plots.laws import plot_approaches, plot_isoflop
from aimscale.analysis.plots.scaling import (
    plot_beside_published,
    plot_fit,
    plot_loss_accuracy,
    plot_points,
    plot_residuals,
)
from aimscale.analysis.plots.style import (
    DARK,
    PAPER,
    human,
    log_axis,
    new_figure,
    ordered_colours,
    power_of_ten,
    save,
    svg_text,
    themed_svg,
)
from aimscale.analysis.published.published import published_frame


@pytest.fixture
def joint(grid):
    return fit("chinchilla", grid, resamples=60)


def drawn_lines(ax):
    """Lines that have points: those of a legend have none."""
    return [line for line in ax.lines if len(line.get_xdata())]


def lightness(colour: str) -> float:
    red, green, blue = (channel / 255 for channel in ImageColor.getrgb(colour))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


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
        "fit": plot_fit(joint, x="D", se=pd.Series(0.001, index=grid.index)),
        "points": plot_points(grid, "params_total", by="images_seen"),
        "residuals": plot_residuals(joint),
        "accuracy": plot_loss_accuracy(probes, links),
        "published": plot_beside_published(grid[grid["images_seen"] == grid["images_seen"].max()], published_frame()),
        "frontier": plot_approaches(approaches),
        "isoflop": plot_isoflop(isoflop_points(points_of(grid.assign(flops_train=1e15), y="val_loss", columns=None))),
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


def test_series_differ_in_grey_and_both_themes_have_contrast():
    for num in (2, 3, 4):
        greys = sorted(lightness(colour) for colour in ordered_colours(num))
        assert min(np.diff(greys)) > 0.01
    for light, dark in DARK.items():
        if light != PAPER and light in ordered_colours(8):
            assert lightness(light) < 0.5 < lightness(dark) + 0.25


def test_names_of_others_are_not_cut(joint):
    named = dataclasses.replace(joint, names={"params_total": "# Params (M) [non-emb]"})
    left, right = (ax.get_xlabel() for ax in plot_residuals(named).axes)
    assert left == "N: # Params (M) [non-emb]"
    assert right == "D: samples seen"


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


def test_isoflop_draws_what_approach_2_accepts():
    n = np.geomspace(1e5, 1e7, 7)
    budgets = np.geomspace(1e13, 1e15, 12)
    curves = [(c, pd.DataFrame({"N": n, "loss": 1 + 0.1 * np.log(n / (1e-8 * c)) ** 2})) for c in budgets]
    alone = [(1.1 * c, pd.DataFrame({"N": [1e6], "loss": [1.0]})) for c, _ in curves]
    minima = pd.DataFrame({"C": [curves[i][0] for i in (1, 5, 9)], "N": [1e5, 1e6, 5e6], "loss": [1.0, 1.0, 1.0]})
    (ax,) = plot_isoflop(sorted(curves + alone, key=lambda pair: pair[0]), minima).axes
    *parabolas, crosses = drawn_lines(ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(parabolas) == 8
    assert len(crosses.get_xdata()) == 3
    assert {power_of_ten(c) for c in minima["C"]} <= set(labels)


def test_accuracy_axes_start_where_the_data_are(grid):
    probes = grid.assign(task="digits", kind="linear", top1=0.9 - 0.1 * grid["val_loss"], chance=0.1)
    probes = probes.assign(top1_lo95=probes["top1"] - 0.01, top1_hi95=probes["top1"] + 0.01)
    axes = plot_loss_accuracy(probes, {}).axes
    assert axes[0].get_ylim()[0] > 0.7


def test_unidentified_laws_still_draw(joint):
    bare = dataclasses.replace(joint, draws={}, intervals={})
    assert len(drawn_lines(plot_fit(bare).axes[0])) == joint.data["D"].nunique()
