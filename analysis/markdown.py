"""The little markdown that study reports are written in, as HTML: headings, tables, lists, bold, code, pictures."""

from __future__ import annotations

import re
from pathlib import Path

from analysis.page import Markup, escape, image, join, table, tag

INLINE = re.compile(r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`")


def inline(text: str) -> Markup:
    """Bold and code; everything else, links included, stays text."""
    parts, at = [], 0
    for found in INLINE.finditer(text):
        parts += [escape(text[at : found.start()])]
        parts += [tag("b", found["bold"]) if found["bold"] else tag("code", found["code"])]
        at = found.end()
    return Markup("".join([*parts, escape(text[at:])]))


def cells(line: str) -> list[Markup]:
    return [
        inline(cell.strip().replace(r"\|", "|")) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))
    ]


def to_html(text: str, folder: Path) -> Markup:
    """Pictures are embedded from `folder`, and only from there; one that is missing is named."""
    return join([_block(block, folder) for block in re.split(r"\n\s*\n", text.strip())])


def _block(block: str, folder: Path) -> Markup:
    lines = block.splitlines()
    heading = re.match(r"(#{1,4}) (.*)", lines[0])
    if heading:
        rest = [_block("\n".join(lines[1:]), folder)] if lines[1:] else []
        return join([tag(f"h{min(len(heading[1]) + 2, 4)}", inline(heading[2])), *rest])
    if lines[0].startswith("|"):
        return _table(lines)
    if all(re.match(r"[-*] |\s", line) for line in lines):
        items = re.split(r"\n?^[-*] ", block, flags=re.M)[1:]
        return tag("ul", *(tag("li", inline(" ".join(item.split()))) for item in items))
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", block)
    if pictures and not re.sub(r"!\[[^\]]*\]\([^)\s]+\)", "", block).strip():
        return join([_picture(folder, name, words) for words, name in pictures])
    return tag("p", inline(" ".join(lines)))


def _table(lines: list[str]) -> Markup:
    rows = [cells(line) for line in lines if not re.fullmatch(r"[|\s:-]+", line)]
    width = len(rows[0])
    return table(rows[0], [(row + [Markup("")] * width)[:width] for row in rows[1:]])


def _picture(folder: Path, name: str, words: str) -> Markup:
    path = folder / Path(name).name
    return (
        image(path, words or name)
        if path.suffix == ".png" and path.is_file()
        else tag("p", f"(no picture {name})")
    )
