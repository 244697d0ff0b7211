"""How every figure looks, and how it leaves: SVG, PDF and PNG with its numbers for a paper, themed SVG for the report.

A figure has the width of a paper's column or of two, and the report shows the same one larger. Colours are colour-blind
safe and differ in lightness, so that figures survive a grey printer; series differ in marker and line style too. The
themed SVG replaces each colour by a CSS variable: one figure serves light and dark.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.words import human, power_of_ten

SINGLE, DOUBLE = 3.3, 6.75
"""Widths of one column of a paper and of two, in inches."""
ON_SCREEN = 2.3
"""By how much a page shows a figure larger than paper does, at most."""

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#d9dde3", "#ffffff"
ACCENT, SECOND = "#0b62a8", "#c8590a"
"""One series against another: blue and vermilion, of different lightness."""

_ORDERED_LIGHT = ["#31135f", "#433e85", "#2f6a8e", "#21908c", "#3fa860", "#86a81c", "#b58d00", "#a4631a"]
_ORDERED_DARK = ["#b79cf0", "#8fa0f5", "#6fb4e6", "#48cfc6", "#6bdc86", "#b9e04a", "#f0d04a", "#f2b170"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2)), (0, (5, 1, 1, 1, 1, 1)),
                           (0, (2, 2)), (0, (8, 1, 2, 1)))  # fmt: skip
MAX_SERIES = len(MARKERS)

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
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "lines.linewidth": 1.1,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside this: seaborn's grid style with our colours, and no state left behind."""
    with mpl.rc_context():
        sns.set_theme(context="paper", style="ticks", rc=_RC | {"axes.grid": True})
        yield


class ShownFigure(Figure):
    """A figure that no global state keeps alive, that a notebook shows when it is a cell's last value, and that knows
    the numbers it draws."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parts: list[tuple[Axes, pd.DataFrame]] = []
        """What was drawn: the axes, and rows of `drawn` without what the axes say."""
        self.num_left_out = 0
        """Points that are not drawn, because there are too many for a page."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)

    @property
    def drawn(self) -> pd.DataFrame:
        """Exactly what is drawn, a row per point: panel, x_axis, y_axis, what, series, x, y, low, high."""
        frames = [
            frame.assign(panel=_panel(ax), x_axis=ax.get_xlabel(), y_axis=ax.get_ylabel().replace("\n", " "))
            for ax, frame in self.parts
        ]
        columns = ["panel", "x_axis", "y_axis", "what", "series", "x", "y", "low", "high"]
        return (
            pd.concat(frames, ignore_index=True).reindex(columns=columns) if frames else pd.DataFrame(columns=columns)
        )


def _panel(ax: Axes) -> str:
    return ax.get_title(loc="left") or ax.get_title()


def new_figure(
    width: float = SINGLE, height: float = 2.5, num_rows: int = 1, num_columns: int = 1, **options: Any
) -> tuple[ShownFigure, list[Axes]]:
    """A figure and its axes, row by row; sizes in inches, options as for `Figure.subplots`."""
    figure = ShownFigure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06, w_pad=0.06))
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
        subs = (
            (1,)
            if decades > (1.8 if label is power_of_ten else 3.3)
            else (1, 3)
            if decades > 2
            else (1, 2, 5)
            if decades > 0.8
            else tuple(range(1, 10))
        )
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
        text = text.replace(light, f"var({css_variable(light)})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"; font-family: [^;\"]*", "", text)  # that of the whole
    looks: dict[str, str] = {}  # of markers: thousands share a few

    def named(found: re.Match[str]) -> str:
        return f'{found[1]} class="{looks.setdefault(found[2], f"{key}-look-{len(looks)}")}"'

    text = re.sub(r'(<use [^>]*?) style="([^"]*)"', named, text)
    rules = "".join(f".{name} {{{look}}}" for look, name in looks.items())
    # a hundredth of a point is seen by nobody, unlike the digits of a text
    text = re.sub(r">[^<]+<|(\d\.\d\d)\d+", lambda found: found[1] or found[0], text)
    width = round(ON_SCREEN * 72 * figure.get_figwidth())
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    font = 'font-family="DejaVu Sans, Verdana, sans-serif"'
    attributes = f'{spaces} {font} role="img" aria-label={quoteattr(label)} style="max-width: {width}px"'
    opening = re.search(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', text)
    assert opening is not None
    return f"<svg {opening[1]} {attributes}><style>{rules}</style>{text[opening.end() :]}"


def css_variable(colour: str) -> str:
    """Name of the CSS variable of a figure colour."""
    return f"--fig-{colour.lstrip('#')}"


def css_variables(dark: bool) -> str:
    """Declarations of all figure colours for one theme."""
    return " ".join(f"{css_variable(light)}: {DARK[light] if dark else light};" for light in DARK)


def png_bytes(figure: Figure, dpi: int = 300) -> bytes:
    """The figure as PNG."""
    return _savefig(figure, "png", dpi=dpi)


def _savefig(figure: Figure, kind: str, **options: Any) -> bytes:
    if (engine := figure.get_layout_engine()) is not None:  # once, so that every format is the same picture
        engine.execute(figure)
        with mpl.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)  # "none" leaves a placeholder, which the next format would find
        part_ticks(figure)
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": "aimscale"}, "pdf": {"CreationDate": None, "Creator": "aimscale"}}
    figure.savefig(buffer, format=kind, metadata=metadata.get(kind, {"Software": "aimscale"}), **options)
    return buffer.getvalue()


def part_ticks(figure: Figure) -> None:
    """Take the label off every tick whose label would touch the one before it; the last one stays."""
    canvas = figure.canvas
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.set_canvas(canvas)
    for ax in figure.axes:
        for axis, side in ((ax.xaxis, 0), (ax.yaxis, 1)):
            _part(axis, side, renderer)


def _part(axis: Axis, side: int, renderer: RendererBase) -> None:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    ends = []
    for tick in sorted(ticks, key=lambda tick: tick.get_loc(), reverse=True):
        box = tick.label1.get_window_extent(renderer)
        ends.append((*((box.x0, box.x1) if side == 0 else (box.y0, box.y1)), tick.get_loc(), tick.label1.get_text()))
    steps = np.diff([start for start, *_ in ends])
    is_even = len(steps) > 1 and np.ptp(steps) < 0.3 * np.abs(steps).max()
    kept: list[tuple[float, float, float, str]] = []
    if is_even:
        kept = next(ends[::step] for step in range(1, len(ends) + 1) if is_apart(ends[::step]))
    for end in ends if not is_even else ():  # as many as there is room for, from the last
        kept += [end] if is_apart([*kept[-1:], end]) else []
    if len(kept) < len(ends):
        texts = {place: text for *_, place, text in kept}
        axis.set_major_formatter(FuncFormatter(lambda value, _: texts.get(value, "")))


def is_apart(ends: Sequence[tuple[float, float, float, str]]) -> bool:
    """Whether labels from the last to the first leave a gap between each other: start, end, and what else."""
    return all(low[1] + GAP < high[0] for high, low in itertools.pairwise(ends))


GAP = 5.0
"""Pixels, of a hundred to the inch, between the labels of two ticks at least."""


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.svg, `stem`.pdf and `stem`.png at a paper's width, and `stem`.csv with exactly what is drawn.

    Returns:
        The paths; without the CSV where the figure was made elsewhere and only some of its axes were drawn here.

    Raises:
        AnalysisError: the path names no file, or the folder cannot be written.

    Example:
        >>> save(fit(read_table("results.parquet"), "chinchilla").plot(), "law")
    """
    stem = Path(stem)
    if stem.name in ("", ".."):
        raise AnalysisError(f"'{stem}' names no figure; give a path such as figures/loss")
    stem = stem.with_suffix("") if stem.suffix in FORMATS else stem
    contents = {".svg": svg_text(figure).encode(), ".pdf": _savefig(figure, "pdf"), ".png": png_bytes(figure)}
    if isinstance(figure, ShownFigure):
        contents[".csv"] = figure.drawn.to_csv(index=False).encode()
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            stem.with_name(stem.name + suffix).write_bytes(content)
    except OSError as error:
        raise AnalysisError(
            f"cannot write {stem}: {error.strerror}; choose a folder that exists and is yours"
        ) from error
    return [stem.with_name(stem.name + suffix) for suffix in contents]


FORMATS = (".svg", ".pdf", ".png", ".csv")
"""What a figure is written as."""
