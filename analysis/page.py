"""The parts of a self-contained HTML page: escaped text, tables, embedded pictures and charts.

The page works offline: it holds no address, and its content security policy lets a browser load nothing.
Text is escaped where it enters; only `Markup` is taken as it is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis import figures

CSS, SCRIPT = (Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js"))
NUMBER = re.compile(r"-|[-+]?[\d,]*\.?\d+(e[-+]\d+)?(\s?%|\s±\s[\d.]+)?")


class Markup(str):
    """Text that is already HTML."""


Section = tuple[str, str, Markup]  # of the page: title, anchor, content


def escape(text: object) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """Return <name attribute="...">content</name>; attributes are written `class_` and `data_chart`."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    written = "".join(f' {names[key]}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{join(content, '')}</{name}>")


def join(parts: Iterable[object], between: str = "\n") -> Markup:
    return Markup(between.join(map(escape, parts)))


def table(header: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """Return a table. A column is aligned to the right if all its cells are numbers or '-'."""
    numeric = [bool(rows) and all(NUMBER.fullmatch(str(row[k])) for row in rows) for k in range(len(header))]

    def line(kind: str, cells: Sequence[object]) -> Markup:
        attributes = [{"class_": "n"} if number else {} for number in numeric]
        return tag("tr", *(tag(kind, cell, **a) for cell, a in zip(cells, attributes, strict=True)))

    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", line("th", header)), tag("tbody", *(line("td", row) for row in rows))]
    return tag("div", tag("table", *parts), class_="wide")


def facts(values: dict[str, object]) -> Markup:
    """Return a grid of small panels, each a name and a value."""
    panels = (tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items())
    return tag("dl", *panels, class_="facts")


def image(path: Path, caption: str) -> Markup:
    """Return a PNG file as an embedded picture."""
    return tag("figure", _embedded(path.read_bytes(), "png", caption), tag("figcaption", caption))


def _embedded(data: bytes, kind: str, alt: str) -> Markup:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Markup(f'<img src="{source}" alt="{escape(alt)}">')


def chart(fig) -> Markup:
    """Return a chart over epochs or steps as SVG; pointing at it shows its values. '' if it has no lines."""
    ax = fig.axes[0]  # a second one, with another scale, shares its x axis
    lines = [line for each in fig.axes for line in each.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return Markup("")
    picture = _embedded(figures.to_svg(fig), "svg+xml", ax.get_title())  # this also computes the layout
    box = ax.get_position()
    style = f"top: {100 - 100 * box.y1:.2f}%; height: {100 * box.height:.2f}%"
    cursor = Markup(f'<i style="{style}" hidden></i>')
    plot = tag("div", picture, cursor, class_="plot", data_chart=json.dumps(_values(fig, ax, lines)))
    return tag("figure", plot, tag("div", "Point at the chart for values.", class_="values"), class_="chart")


def _values(fig, ax, lines) -> dict:
    """Return what page.js needs: names of points, their places (percent of the width), values as text."""
    curves = [dict(zip(*line.get_data(), strict=True)) for line in lines]
    at = sorted({int(x) for values in curves for x in values})
    bottom = ax.get_ylim()[0]  # not 0, which a logarithmic axis does not have
    places = [round(100 * ax.transData.transform((x, bottom))[0] / fig.bbox.width, 2) for x in at]
    names = [line.get_label().replace(r"\$", "$") for line in lines]
    series = [
        {"name": name, "text": [f"{values[x]:.5g}" if x in values else None for x in at]}
        for name, values in zip(names, curves, strict=True)
    ]
    points = [f"{ax.get_xlabel()} {x:,}" for x in at]
    return {"points": points, "x": places, "series": series}


def details(title: str, content: object) -> Markup:
    return tag("details", tag("summary", title), content)


def section(title: str, anchor: str, *content: object) -> Section:
    return title, anchor, tag("section", tag("h2", title), join(content), id=anchor)


def page(title: str, lead: str, sections: Sequence[Section], reload: int = 0) -> str:
    """Return a whole document with its chapters and links to them; `reload` is in seconds, 0 for never."""
    links = tag("nav", *(tag("a", name, href=f"#{anchor}") for name, anchor, _ in sections))
    chapters = tag("main", join(markup for _, _, markup in sections))
    body = join([tag("p", lead, class_="soft"), links, chapters])
    return document(title, body, head=f'<meta http-equiv="refresh" content="{reload}">' if reload else "")


def document(
    title: str, body: Markup, css: str = CSS, script: str = SCRIPT, *, connect: str = "", head: str = ""
) -> str:
    """Return a document that may run this one script and load nothing but, perhaps, from `connect`.

    The policy allows the script by its hash, and no address: even markup that slipped through could
    neither run nor load anything.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += f"; connect-src {connect}" if connect else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">{head}
<title>{escape(title)}</title><style>{css}</style></head>
<body><h1>{escape(title)}</h1>{body}
<script>{script}</script></body></html>
"""
