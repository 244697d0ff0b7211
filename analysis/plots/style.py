"""How every figure looks, and how it leaves: SVG or PNG for a paper, themed SVG for the report.

Colours are colour-blind safe and differ in lightness, so that figures survive a grey printer; series differ in
marker and line style too. The themed SVG replaces each colour by a CSS variable: one figure serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from aimscale.analysis.errors import AnalysisError

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#d9dde3", "#ffffff"
ACCENT, SECOND = "#0b62a8", "#c8590a"
"""One series against another: blue and vermilion, of different lightness."""

_ORDERED_LIGHT = ["#31135f", "#433e85", "#2f6a8e", "#21908c", "#3fa860", "#86a81c", "#b58d00", "#a4631a"]
_ORDERED_DARK = ["#b79cf0", "#8fa0f5", "#6fb4e6", "#48cfc6", "#6bdc86", "#b9e04a", "#f0d04a", "#f2b170"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2)), (0, (5, 1, 1, 1, 1, 1)),
                           (0, (2, 2)), (0, (8, 1, 2, 1)))  # fmt: skip
MAX_SERIES = len(MARKERS)
RASTERISE_ABOVE = 3000
"""Points above which a scatter is stored as an image inside the vector figure."""

DARK = {
    INK: "#e8ebef",
    MUTED: "#a3adb8",
    GRID: "#333a43",
    PAPER: "#14171b",
    ACCENT: "#6db5f2",
    SECOND: "#f59a55",
} | dict(zip(_ORDERED_LIGHT, _ORDERED_DARK, strict=True))
"""Colour in a figure -> its counterpart on a dark page."""

_RC = {
    "figure.dpi": 100,
    "figure.constrained_layout.w_pad": 0.09,  # inches; the default cuts the first letter of long labels
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "path",
    "lines.linewidth": 1.7,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside this: seaborn's grid style with our colours, and no state left behind."""
    with mpl.rc_context():
        sns.set_theme(context="paper", style="ticks", rc=_RC | {"axes.grid": True})
        yield


class ShownFigure(Figure):
    """A figure that no global state keeps alive, and that a notebook shows when it is a cell's last value."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def new_figure(
    width: float = 5.4, height: float = 3.7, num_rows: int = 1, num_columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; sizes in inches, options as for `Figure.subplots`."""
    figure = ShownFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def figure_of(ax: Axes) -> Figure:
    """The figure that holds the axes, of sub-figures the outermost."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def ordered_colours(num: int) -> list[str]:
    """Colours for `num` ordered series, dark to light."""
    picks = np.linspace(0, len(_ORDERED_LIGHT) - 1, num).round().astype(int) if num > 1 else [2]
    return [_ORDERED_LIGHT[i] for i in picks]


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SI = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def human(value: float, digits: int = 3) -> str:
    """A count as people say it: 27.6k, 1.21M, 6.44B; beyond that, and below 0.001, a power of ten."""
    if not np.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return power_of_ten(value, digits)
    for scale, letter in _SI:
        if size >= scale * 0.9995:
            return f"{float(f'{value / scale:.{digits}g}'):.{max(digits, 6)}g}{letter}"
    return f"{float(f'{value:.{digits}g}'):.{max(digits, 6)}g}"


def power_of_ten(value: float, digits: int = 2) -> str:
    """A number of FLOPs: 3×10¹³."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def log_axis(
    axes: Axes,
    which: str,
    values: ArrayLike,
    ticks: Sequence[float] | None = None,
    label: Callable[[float], str] = human,
) -> None:
    """Logarithmic axis with few, human tick labels: the given ticks, or round numbers over the range of `values`."""
    finite = np.asarray([v for v in np.ravel(np.asarray(values, float)) if 1e-200 < v < 1e200], float)
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    if finite.size:
        pad = (finite.max() / finite.min()) ** 0.06 if finite.max() > finite.min() else 1.5
        low, high = finite.min() / pad, finite.max() * pad
        (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
        decades = np.log10(high / low)
        subs = (1,) if decades > 3.3 else (1, 3) if decades > 2 else (1, 2, 5) if decades > 0.8 else tuple(range(1, 10))
        round_numbers = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]) if decades < 0.5 else LogLocator(subs=subs, numticks=8)
        axis.set_major_locator(FixedLocator(ticks) if ticks else round_numbers)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def svg_text(figure: Figure) -> str:
    """The figure as a stand-alone SVG document: text as outlines, no date; the same figure gives the same bytes."""
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "aimscale"}):
        return _savefig(figure, "svg").decode("utf-8")


def themed_svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an `<svg>` element for one page: real text, ids unique by `key`, colours as CSS variables."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        text = _savefig(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
    for light in DARK:
        text = re.sub(light, f"var({css_variable(light)})", text, flags=re.IGNORECASE)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    width = round(1.45 * 72 * figure.get_figwidth())
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    attributes = f'{spaces} role="img" aria-label={quoteattr(label)} style="max-width: {width}px"'
    opening = re.search(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', text)
    assert opening is not None
    return f"<svg {opening[1]} {attributes}>{text[opening.end() :]}"


def alone(themed: str) -> str:
    """A themed SVG as a file of its own, in light colours."""
    return re.sub(r"var\(--fig-(\w+)\)", r"#\1", themed).replace("<svg ", '<svg font-family="DejaVu Sans" ', 1)


def css_variable(colour: str) -> str:
    """Name of the CSS variable of a figure colour."""
    return f"--fig-{colour.lstrip('#')}"


def css_variables(dark: bool) -> str:
    """Declarations of all figure colours for one theme."""
    return " ".join(f"{css_variable(light)}: {DARK[light] if dark else light};" for light in DARK)


def png_bytes(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as PNG."""
    return _savefig(figure, "png", dpi=dpi)


def _savefig(figure: Figure, kind: str, **options: Any) -> bytes:
    if figure.get_layout_engine() is not None:  # lay out once, so that every format is the same picture
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": "aimscale"} if kind == "svg" else {"Software": "aimscale"}
    figure.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png; returns their paths.

    Raises:
        AnalysisError: the path names no file.
    """
    if stem.name in ("", ".."):
        raise AnalysisError(f"'{stem}' names no figure; give a path such as figures/loss")
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    paths[0].write_text(svg_text(figure), encoding="utf-8")
    paths[1].write_bytes(png_bytes(figure))
    return paths
