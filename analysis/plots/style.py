"""Style and formats of figures: SVG, PDF and PNG for a paper, and SVG inside a page.

A figure has the width of a paper's column or of two. Colours are colour-blind safe and differ in lightness, so that
figures survive a grey printer; series differ in marker and line style too. What a user has set in `rcParams` stays.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
import numpy as np
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import written_aside

SINGLE, DOUBLE = 3.3, 6.75
"""Widths of one column of a paper and of two, in inches."""
ON_SCREEN = 2.3
"""Factor by which a page shows a figure larger than paper does, at most."""
KINDS = ("svg", "pdf", "png")
"""Formats of a saved figure."""
INK, MUTED, PAPER = "#1b1f24", "#5b6470", "#ffffff"
ORDERED = ("#31135f", "#433e85", "#2f6a8e", "#21908c", "#3fa860", "#86a81c", "#b58d00", "#a4631a")
"""Colours of ordered series."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

_RC = {
    "axes.prop_cycle": cycler(color=["#0b62a8", "#c8590a", INK, "#21908c", "#86a81c", "#433e85"]),
    "axes.linewidth": 0.7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.87",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "font.sans-serif": ["DejaVu Sans"],
    "pdf.fonttype": 42,
    "lines.linewidth": 1.1,
}


def _is_default(name: Any) -> bool:
    """Tell whether a parameter is matplotlib's own: neither a user nor an outer figure has set it."""
    return bool(mpl.rcParams[name] == mpl.rcParamsDefault[name])


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside this: seaborn's theme at a paper's size, but for what the user has set, and no state left behind."""
    theme = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper", font_scale=0.78), **_RC}
    with mpl.rc_context({name: value for name, value in theme.items() if _is_default(name)}):
        yield


class ShownFigure(Figure):
    """A figure that no global state keeps alive, and that a notebook shows when it is a cell's last value."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def new_figure(
    width: float = SINGLE, height: float = 2.5, num_rows: int = 1, num_columns: int = 1, **options: Any
) -> tuple[ShownFigure, list[Axes]]:
    """Make a figure and its axes, row by row; sizes in inches, options as for `Figure.subplots`.

    A figure of one panel has the size that the user has set.
    """
    is_own = num_rows * num_columns == 1 and not _is_default("figure.figsize")
    figure = ShownFigure(figsize=None if is_own else (width, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **options).ravel())


def figure_of(ax: Axes) -> Figure:
    """Get the figure that holds the axes, of sub-figures the outermost."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def cycled(number: int) -> Any:
    """Get a colour of the cycle, as it is now."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key().get("color", [INK])
    return colours[number % len(colours)]


def palette(names: Iterable[Any], color: Any = None) -> dict[Any, Any]:
    """Map the names of ordered series to colours, dark to light; a single one, or all, to one colour."""
    names = list(names)
    if color is not None or len(names) == 1:
        return dict.fromkeys(names, cycled(0) if color is None else color)
    picks = np.linspace(0, len(ORDERED) - 1, len(names)).round().astype(int)
    return {name: ORDERED[i] for name, i in zip(names, picks, strict=True)}


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """Write the figure as an `<svg>` element for one page: real text, no background, ids unique by `key`."""
    text = _image(figure, "svg", fonttype="none", hashsalt=key, transparent=True).decode("utf-8")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    looks: dict[str, str] = {}  # thousands of markers share a few

    def named(found: re.Match[str]) -> str:
        return f'class="{looks.setdefault(found[1], f"{key}-look-{len(looks)}")}"'

    text = re.sub(r'(?<= )style="([^"]*)"', named, text)
    rules = "".join(f".{name} {{{look}}}" for look, name in looks.items())
    # a hundredth of a point is seen by nobody, unlike the digits of a text
    text = re.sub(r">[^<]+<|(\d\.\d\d)\d+", lambda found: found[1] or found[0], text)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    width = round(ON_SCREEN * 72 * figure.get_figwidth())
    attributes = f'{spaces} role="img" aria-label={quoteattr(label)} style="max-width: {width}px"'
    _, view_box, body = re.split(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', text)
    return f"<svg {view_box} {attributes}><style>{rules}</style>{body}"


def png_bytes(figure: Figure, dpi: int = 300) -> bytes:
    """Write the figure as PNG."""
    return _image(figure, "png", dpi=dpi)


def _image(
    figure: Figure, kind: str, fonttype: str = "path", hashsalt: str = "aimscale", dpi: int = 200, **options: Any
) -> bytes:
    """Write the figure without a date: the same figure gives the same bytes. Text of an SVG becomes outlines."""
    undated = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": hashsalt}):
        figure.savefig(buffer, format=kind, metadata=undated.get(kind), dpi=dpi, **options)
    return buffer.getvalue()


def save(figure: Figure, stem: str | Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Write `stem`.svg, `stem`.pdf and `stem`.png at a paper's width.

    Args:
        figure: a figure of ours, or any other of matplotlib's.
        stem: path of the files without their suffix.
        kinds: formats to write, of svg, pdf and png.

    Returns:
        The paths.

    Raises:
        AnalysisError: the path names no file, or the folder cannot be written.

    Example:
        >>> save(fit(read_table("results.parquet"), "chinchilla").plot(), "law")
    """
    stem = Path(stem)
    if stem.name in ("", ".."):
        raise AnalysisError(f"'{stem}' names no figure; give a path such as figures/loss")
    stem = stem.with_suffix("") if stem.suffix[1:] in KINDS else stem
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, kind in zip(paths, kinds, strict=True):
            content = png_bytes(figure) if kind == "png" else _image(figure, kind)
            with written_aside(path) as aside:
                aside.write_bytes(content)
    except OSError as error:
        why = f"cannot write {stem}: {error.strerror}; choose a folder that exists and is yours"
        raise AnalysisError(why) from error
    return paths
