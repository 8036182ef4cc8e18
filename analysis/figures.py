"""The style of every picture, how it is saved, and galleries of images.

The functions draw the values they are given and know nothing about runs or models. The colours are those
of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure  # pyplot would keep every figure in memory

from base import files
from base.errors import tell

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
LINES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
MAP = "cividis"
# Class names may be in any script: what the first font lacks is drawn with the next one installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans GB", "Arial Unicode MS")
GREY = np.array([0.299, 0.587, 0.114])  # brightness of red, green and blue
matplotlib.rcParams.update(
    {
        "font.family": sorted(set(FONTS) & set(font_manager.get_font_names()), key=FONTS.index),
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.hashsalt": "analysis",  # fixed ids: the same picture is the same file
    }
)


def figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure; width and height are in inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    if title:
        fig.suptitle(title)
    return fig


def save(fig: Figure, path: str | os.PathLike, dpi: int = 110) -> Path:
    """Write a .png, .svg or .pdf, completely or not at all. Raises ResourceError if it cannot be written."""
    kind = Path(path).suffix[1:]
    # Without the date, the same picture is the same file.
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with files.replacing(path) as partial, _noting_missing_letters():
        fig.savefig(partial, format=kind, dpi=dpi, metadata=dated)
    return Path(path)


def to_svg(fig: Figure) -> bytes:
    """Return the figure as SVG on a transparent background, with letters as outlines: no font is needed."""
    buffer = io.BytesIO()
    with _noting_missing_letters():
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


@contextmanager
def _noting_missing_letters() -> Iterator[None]:
    """Replace matplotlib's warnings, one for each letter that its fonts lack, by one note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the filters outside decide about the others
        yield
    for warning in caught:
        if "missing from font" in str(warning.message) or "natively" in str(warning.message):
            _note_missing_letters()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@functools.cache  # once in a command
def _note_missing_letters() -> None:
    what = "pictures show boxes for letters that no installed font has"
    tell(f"note: {what}; Noto Sans CJK has Chinese, Japanese and Korean")


def line_style(k: int) -> dict[str, str]:
    """Return colour and dashes of line k; the dashes change when the colours repeat."""
    return {"color": LINES[k % len(LINES)], "linestyle": DASHES[k // len(LINES) % len(DASHES)]}


def gallery(
    images: Sequence[np.ndarray], captions: Sequence[str], *, title: str, columns: int = 6, side: float = 1.7
) -> Figure:
    """Draw pictures, `columns` to a row, each above its caption; see `strips`."""
    starts = range(0, len(images), columns)
    rows = [(images[k : k + columns], captions[k : k + columns]) for k in starts]
    return strips(rows, title=title, side=side)


def strips(
    rows: Sequence[tuple[Sequence[np.ndarray], Sequence[str]]],
    *,
    title: str,
    side: float = 1.7,
    names: Sequence[str] = (),
) -> Figure:
    """Draw rows of pictures, each row (images, captions); `names` stand to the left of the rows.

    An image is (H, W, 3) uint8, or (H, W) numbers that are drawn in the colours of `MAP`. `side` is the
    width of a picture in inches.
    """
    columns = max(len(images) for images, _ in rows)
    lines = [1 + max((caption.count("\n") for caption in captions), default=0) for _, captions in rows]
    heights = [side + 0.16 * n for n in lines]
    fig = figure(max(columns * side * 1.02, 6.5), sum(heights) + 0.25 * (2 + title.count("\n")), title)
    grid = fig.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for ax in grid.flat:
        ax.axis("off")
    for (images, captions), row in zip(rows, grid, strict=True):
        for ax, image, caption in zip(row, images, captions, strict=False):
            ax.imshow(image, interpolation="nearest", cmap=MAP)  # cmap is ignored for (H, W, 3)
            ax.set_title(caption, fontsize=8, y=-0.02, pad=-2, va="top")
    for name, (ax, *_) in zip(names, grid, strict=False):
        left = {"transform": ax.transAxes, "ha": "right", "va": "center", "rotation": 90}
        ax.text(-0.06, 0.5, name, fontsize=9, **left)
    return fig


def shorten(text: str, width: int = 18) -> str:
    """Return `text` cut to `width` characters, with dollar signs escaped, which start maths in matplotlib."""
    text = text if len(text) <= width else text[: width - 1] + "…"
    text = " " * text.startswith("_") + text  # legends leave out what begins with _
    return text.replace("$", r"\$")
