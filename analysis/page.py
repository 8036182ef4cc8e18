"""A self-contained HTML page: text escaped, pictures embedded, light and dark, phone and print.

No address of any kind leads out of the page, and its policy lets a browser load nothing. Whatever a
caller passes as text is escaped here; only the functions of this file and of `svg` make markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59626c; --paper: #ffffff; --panel: #f4f6f8; --line: #d0d6dc;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568a; --c4: #a87400; --c5: #2f8fc4; --c6: #000000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb8; --paper: #14171a; --panel: #1f2428;
  --line: #3b434b; --c0: #56b4e9; --c1: #ff8c42; --c2: #2fc99b; --c3: #e39ac4; --c4: #e6b045; --c5: #9ad0f5; --c6: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4em 0; } h2 { font-size: 1.25rem; margin: 2em 0 .6em;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 1.4em 0 .4em; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; } a { color: var(--c0); } p, li { max-width: 75ch; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 8px; margin: 12px 0; padding: 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: 8px 12px; } .facts dt { color: var(--soft);
  font-size: .8rem; } .facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; } td { max-width: 34ch; overflow-wrap: anywhere; } td.n { white-space: nowrap; }
figure { margin: 12px 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.chart { margin: 0; } .chart svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .8rem; } .legend svg { display: inline; width: 26px;
  height: 10px; margin-right: 4px; } .now { min-height: 3.2em; font-size: .8rem; color: var(--soft); }
code, pre { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 640px) { figure:not(.chart) { overflow-x: auto; } figure img { max-width: none; width: 860px; } }
summary { cursor: pointer; } details { margin: 10px 0; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --panel: #f4f4f4; --line: #bbb; --c0: #0072b2;
  --c1: #d55e00; --c2: #009e73; --c3: #b0568a; --c4: #a87400; --c5: #2f8fc4; --c6: #000; } body { max-width: none; font-size: 11pt; }
  nav, .now { display: none; } .charts { grid-template-columns: 1fr 1fr; }
  figure img { max-width: 100% !important; width: auto !important; }
  figure, .chart, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide { overflow: visible; } }
"""

# Only hover: the nearest epoch's values under a chart, and a line at it.
SCRIPT = """
for (const chart of document.querySelectorAll('.chart')) {
  const svg = chart.querySelector('svg.plot'), line = svg.querySelector('.cursor'), now = chart.querySelector('.now');
  const data = JSON.parse(svg.dataset.chart), rest = now.textContent;
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * data.width;
    let nearest = 0;
    data.x.forEach((x, k) => { if (Math.abs(x - at) < Math.abs(data.x[nearest] - at)) nearest = k; });
    line.setAttribute('x1', data.x[nearest]); line.setAttribute('x2', data.x[nearest]);
    line.setAttribute('visibility', 'visible');
    const parts = data.series.filter(s => s.text[nearest] !== null).map(s => s.name + ' ' + s.text[nearest]);
    now.textContent = 'epoch ' + data.epochs[nearest] + ': ' + parts.join(' | ');
  });
  svg.addEventListener('pointerleave', () => { line.setAttribute('visibility', 'hidden'); now.textContent = rest; });
}
"""


class Markup(str):
    """Text that is HTML already; everything else is escaped where it enters."""


def escape(text: object) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(str(text), quote=True))


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """<name attribute="...">content</name>; `class_` is written class."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{''.join(map(escape, content))}</{name}>")


def join(parts: Sequence[object], between: str = "\n") -> Markup:
    return Markup(between.join(map(escape, parts)))


def table(header: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """Columns whose cells are all numbers (or '-') are set flush right."""
    rows = [list(map(escape, row)) for row in rows]
    right = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(header))]

    def line(kind: str, cells: Sequence[object]) -> Markup:
        return tag(
            "tr",
            *(tag(kind, c, class_="n") if r else tag(kind, c) for c, r in zip(cells, right, strict=True)),
        )

    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", line("th", header)), tag("tbody", *(line("td", row) for row in rows))]
    return tag("div", tag("table", *parts), class_="wide")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%").strip() or "x")
    except ValueError:
        return text == "-"
    return True


def facts(pairs: Sequence[tuple[str, object]]) -> Markup:
    """A grid of small panels: what, and how much."""
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts"
    )


def image(path: Path, caption: str) -> Markup:
    """A PNG, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    picture = Markup(f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">')
    return tag("figure", picture, tag("figcaption", caption))


def details(title: str, content: object) -> Markup:
    return tag("details", tag("summary", title), content)


def section(title: str, anchor: str, *content: object) -> tuple[str, str, Markup]:
    """(title, anchor, markup) of a chapter, for `page`."""
    return title, anchor, tag("section", tag("h2", title), join(content), id=anchor)


def page(title: str, lead: str, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """The whole document."""
    # The policy names this one script by its hash and allows no address: even markup that slipped
    # through could neither run nor call home.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = tag("nav", *(tag("a", name, href=f"#{anchor}") for name, anchor, _ in sections))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p>{links}
<main>{join([markup for _, _, markup in sections])}</main>
<script>{SCRIPT}</script></body></html>
"""
