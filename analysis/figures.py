"""How every picture here looks: colours that all eyes tell apart, titles, units, and one way to write a PNG.

Nothing in this file knows a run or a model; it draws the values it is given. Colours are those of
Okabe and Ito (https://jfly.uni-koeln.de/color/), maps are cividis.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot: it keeps every figure alive

from base.errors import ResourceError

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
LINES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
MAP = "cividis"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of so many inches."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=12)
    return made


def axes(made: Figure, rows: int, columns: int, **how) -> np.ndarray:
    """A (rows, columns) array of axes in this file's style."""
    with matplotlib.rc_context(STYLE):
        return made.subplots(rows, columns, squeeze=False, **how)


def save(made: Figure, path: str | os.PathLike, dpi: int = 110) -> Path:
    """Write a PNG, whole or not at all. Raises ResourceError where it cannot be written."""
    path = Path(path)
    # A pipe or a device is written to: a rename would put a file in its place.
    partial = path.with_name(path.name + ".partial") if path.is_file() or not path.exists() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            made.savefig(partial, format="png", dpi=dpi)
        if partial != path:
            os.replace(partial, path)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}", "name a writable directory with --out"
        ) from None
    return path


def line_style(k: int) -> dict[str, str]:
    """Colour and dashes of the k-th of many lines: dashes tell apart what colours no longer do."""
    return {"color": LINES[k % len(LINES)], "linestyle": DASHES[k // len(LINES) % len(DASHES)]}


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    unit: str,
    row_title: str = "",
    column_title: str = "",
    spec: str = ".1f",
    cmap: str = MAP,
) -> Figure:
    """A grid of numbers such as accuracy over lr x batch size: values (len(rows), len(columns)), NaN for none.

    Every cell carries its number while there is room for it; with more than 40 rows or columns only
    some are named.
    """
    values = np.asarray(values, float)
    made = figure(min(14, 2.6 + 0.62 * len(columns)), min(12, 1.9 + 0.42 * len(rows)))
    axis = axes(made, 1, 1)[0, 0]
    image = axis.imshow(np.ma.masked_invalid(values), cmap=cmap, aspect="auto")
    axis.set(title=title, xlabel=column_title, ylabel=row_title)
    axis.grid(False)
    _name_ticks(axis.xaxis, columns)
    _name_ticks(axis.yaxis, rows)
    if max(len(columns), 1) <= 16 and len(rows) <= 30:
        _write_cells(axis, values, image, spec)
    made.colorbar(image, label=unit)
    return made


def _name_ticks(axis, names: Sequence[str]) -> None:
    step = max(1, -(-len(names) // 40))
    where = range(0, len(names), step)
    long = max((len(str(name)) for name in names), default=0) > 5
    axis.set_ticks(
        list(where),
        [str(names[k]) for k in where],
        fontsize=9,
        **({"rotation": 45, "ha": "right"} if axis.axis_name == "x" and long else {}),
    )


def _write_cells(axis, values: np.ndarray, image, spec: str) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axis.text(column, row, format(value, spec), ha="center", va="center", color=ink, fontsize=9)


def gallery(
    images: Sequence[np.ndarray], captions: Sequence[str], *, title: str, columns: int = 6, side: float = 1.7
) -> Figure:
    """Pictures (H, W, 3) uint8 or (H, W), `columns` in a row, each with its caption below."""
    columns = max(1, min(columns, len(images)))
    cuts = range(0, len(images), columns)
    return strips(
        [(images[k : k + columns], captions[k : k + columns]) for k in cuts], title=title, side=side
    )


def strips(
    rows: Sequence[tuple[Sequence[np.ndarray], Sequence[str]]],
    *,
    title: str,
    side: float = 1.7,
    names: Sequence[str] = (),
) -> Figure:
    """Rows of pictures, each (images, captions); `names` stand at the left of the rows.

    An image is (H, W, 3) uint8 or, drawn in this file's colours, (H, W) numbers.
    """
    columns = max(len(images) for images, _ in rows)
    lines = [1 + max((caption.count("\n") for caption in captions), default=0) for _, captions in rows]
    height = sum(side + 0.16 * n for n in lines) + 0.25 * (2 + title.count("\n"))
    made = figure(max(columns * side * 1.02, 6.5), height, title)
    cells = axes(made, len(rows), columns, gridspec_kw={"height_ratios": [side + 0.16 * n for n in lines]})
    for cell in cells.flat:
        cell.axis("off")
    for (images, captions), row in zip(rows, cells, strict=True):
        for cell, image, caption in zip(row, images, captions, strict=False):
            cell.imshow(image, interpolation="nearest", **({"cmap": MAP} if np.ndim(image) == 2 else {}))
            cell.set_title(caption, fontsize=8, y=-0.02, pad=-2, va="top")
    for name, row in zip(names, cells, strict=False):
        row[0].text(
            -0.06, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=9, rotation=90
        )
    return made


def shorten(text: str, width: int = 18) -> str:
    """`text`, cut with an ellipsis where it is longer than `width`; safe from matplotlib's math mode."""
    text = text if len(text) <= width else text[: width - 1] + "…"
    return text.replace("$", r"\$")
