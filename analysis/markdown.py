"""The markdown that study reports use, as HTML: headings, tables, lists, bold, code and pictures."""

from __future__ import annotations

import re
from pathlib import Path

from analysis.page import Markup, image, join, table, tag

INLINE = re.compile(r"(\*\*.+?\*\*|`[^`]+`)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")

SPACES = re.compile(
    r"(?<=[\d±,]) (?=[-+]?[\d±])"
)  # within "1.5 ± 0.2" and "[-1.5, +0.2]": not to break there


def to_html(text: str, folder: Path) -> Markup:
    """Return `text` as HTML. Pictures come from `folder` only; a missing one is named."""
    return join(_block(block, folder) for block in re.split(r"\n\s*\n", text.strip()))


def _block(block: str, folder: Path) -> Markup:
    first, *rest = lines = block.splitlines()
    if heading := re.match(r"(#{1,4}) (.*)", first):
        below = [_block("\n".join(rest), folder)] if rest else []
        return join([tag(f"h{min(len(heading[1]) + 2, 4)}", _inline(heading[2])), *below])
    if first.startswith("|"):
        return _table(lines)
    if all(re.match(r"[-*] |\s", line) for line in lines):
        items = re.split(r"\n?^[-*] ", block, flags=re.MULTILINE)[1:]
        return tag("ul", *(tag("li", _inline(" ".join(item.split()))) for item in items))
    pictures = PICTURE.findall(block)
    if pictures and not PICTURE.sub("", block).strip():
        return join(_picture(folder, name, words) for words, name in pictures)
    return tag("p", _inline(" ".join(lines)))


def _inline(text: str) -> Markup:
    """Bold and code; everything else, links included, stays text."""
    parts = INLINE.split(text)  # every second part is bold or code
    parts[1::2] = [
        tag("b", part[2:-2]) if part.startswith("**") else tag("code", part[1:-1]) for part in parts[1::2]
    ]
    return join(parts, "")


def _table(lines: list[str]) -> Markup:
    rows = [_cells(line) for line in lines if not re.fullmatch(r"[|\s:-]+", line)]
    width = len(rows[0])
    return table(rows[0], [(row + [Markup("")] * width)[:width] for row in rows[1:]])


def _cells(line: str) -> list[Markup]:
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [_inline(SPACES.sub("\N{NO-BREAK SPACE}", cell.strip().replace(r"\|", "|"))) for cell in cells]


def _picture(folder: Path, name: str, words: str) -> Markup:
    path = folder / Path(name).name
    if path.suffix == ".png" and path.is_file():
        return image(path, words or name)
    return tag("p", f"(no picture {name})")
