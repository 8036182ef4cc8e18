"""Line charts as inline SVG, with the values of every epoch for the page's hover."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.page import Markup, escape, tag

WIDTH, HEIGHT = 460, 300  # units; small, so that text stays legible where the chart is as wide as a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 30, 40
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLOURS = 7  # --c0 to --c6 of the page


@dataclass(frozen=True)
class Line:
    """One curve: values at epochs."""

    name: str
    epochs: Sequence[int]
    values: Sequence[float]
    colour: int
    dash: int = 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    spec: str = ".2f",
    marks: Sequence[tuple[float, str]] = (),
    best: tuple[int, float] | None = None,
) -> Markup:
    """A figure. marks: (epoch, words) where a phase begins; best: the point to star."""
    lines = [line for line in lines if line.epochs]
    if not lines:
        return Markup("")
    epochs = sorted({epoch for line in lines for epoch in line.epochs})
    values = [value for line in lines for value in line.values]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad

    def x(epoch: float) -> float:
        span = max(epochs[-1] - epochs[0], 1)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - epochs[0] + 0.5) / (span + 1), 2)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 2)

    parts = [*_axes(epochs, low, high, x, y), *_marks(marks, epochs[0], x)]
    parts += [_curve(line, x, y) for line in lines]
    if best:
        parts.append(
            f'<text x="{x(best[0])}" y="{y(best[1]) + 6}" text-anchor="middle" font-size="18" '
            f'fill="var(--ink)">★</text>'
        )
    parts.append(
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)" visibility="hidden"/>'
    )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>')
    plot = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" fill="var(--soft)" role="img" '
        f'aria-label="{escape(title)}" data-chart="{escape(_hover(lines, epochs, x, spec))}">{"".join(parts)}</svg>'
    )
    legend = tag("div", *(_key(line) for line in lines), class_="legend")
    words = "Point at the chart for values." + (" ★ best epoch." if best else "")
    return tag(
        "figure",
        tag("h3", f"{title} ({unit})"),
        Markup(plot),
        legend,
        tag("div", words, class_="now"),
        class_="chart",
    )


def _axes(epochs: Sequence[int], low: float, high: float, x, y) -> list[str]:
    parts = []
    for value in ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 5}" y="{y(value) + 4}" text-anchor="end">{value:.4g}</text>'
        )
    whole = sorted({round(t) for t in ticks(epochs[0], epochs[-1], 7)})
    parts += [f'<text x="{x(t)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t}</text>' for t in whole]
    return parts


def _marks(marks: Sequence[tuple[float, str]], first: int, x) -> list[str]:
    """Dashed lines where phases begin; words only where the ones before leave room."""
    parts, free = [], 0.0
    for epoch, words in marks:
        at = x(epoch - 0.5)
        if epoch > first:
            parts.append(
                f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)" stroke-dasharray="4 3"/>'
            )
        if at >= free:
            parts.append(f'<text x="{at + 2}" y="{TOP - 6}" font-size="11">{escape(words)}</text>')
            free = at + 6.5 * len(words)
    return parts


def _stroke(line: Line) -> str:
    dash = f' stroke-dasharray="{DASHES[line.dash]}"' if line.dash else ""
    return f'stroke="var(--c{line.colour % COLOURS})" stroke-width="2"{dash}'


def _curve(line: Line, x, y) -> str:
    points = [(x(epoch), y(value)) for epoch, value in zip(line.epochs, line.values, strict=True)]
    drawn = f'<polyline fill="none" {_stroke(line)} points="{" ".join(f"{a},{b}" for a, b in points)}"/>'
    if len(points) == 1:  # a line of one point is invisible
        drawn += (
            f'<circle cx="{points[0][0]}" cy="{points[0][1]}" r="3" fill="var(--c{line.colour % COLOURS})"/>'
        )
    return drawn


def _key(line: Line) -> Markup:
    sample = Markup(
        f'<svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" {_stroke(line)}/></svg>'
    )
    return tag("span", sample, line.name)


def _hover(lines: Sequence[Line], epochs: Sequence[int], x, spec: str) -> str:
    named = [(line.name, dict(zip(line.epochs, line.values, strict=True))) for line in lines]
    texts = [
        {"name": name, "text": [format(values[e], spec) if e in values else None for e in epochs]}
        for name, values in named
    ]
    return json.dumps(
        {"width": WIDTH, "epochs": epochs, "x": [x(epoch) for epoch in epochs], "series": texts}
    )
