"""A table of a report, as markdown, LaTeX and CSV."""

from __future__ import annotations

import re
from dataclasses import dataclass

from base import files

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "→": r"$\rightarrow$", "×": r"$\times$",
}  # fmt: skip

PAIR = re.compile(r"([+-]?[\d.]+) (?:to|±) ([+-]?[\d.]+)")


@dataclass(frozen=True)
class Table:
    """Cells are text, in which **bold** and `code` are marked as in markdown."""

    name: str  # of its files
    title: str
    header: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def without_empty_columns(self) -> Table:
        kept = [k for k in range(len(self.header)) if any(row[k] != "-" for row in self.rows)]
        rows = [[row[k] for k in kept] for row in self.rows]
        return Table(self.name, self.title, [self.header[k] for k in kept], rows)

    def markdown(self) -> str:
        table = files.markdown_table(self.header, self.rows)
        return f"{self.title}\n\n{table}" if self.title else table

    def csv(self) -> str:
        """Return the table with a number in each cell: "a to b" and "a ± b" become two columns."""
        header, columns = [], []
        for name, cells in zip(self.header, zip(*self.rows, strict=True), strict=True):
            pairs = [PAIR.fullmatch(cell) for cell in cells]
            if not any(pairs):
                header.append(name)
                columns.append([number(cell) for cell in cells])
                continue
            low, high = ("low", "high") if any(" to " in cell for cell in cells) else ("mean", "deviation")
            header += [f"{name}, {low}", f"{name}, {high}"]
            columns.append([number(p[1] if p else cell) for p, cell in zip(pairs, cells, strict=True)])
            columns.append([number(p[2]) if p else None for p in pairs])
        return files.csv_text(header, zip(*columns, strict=True))

    def latex(self) -> str:
        """Return a table for LaTeX, which needs \\usepackage{booktabs}."""
        header, *rows = (" & ".join(map(latex_text, row)) + r" \\" for row in (self.header, *self.rows))
        sides = "".join("r" if is_number(cells[0]) else "l" for cells in zip(*self.rows, strict=True))
        lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", header, r"\midrule"]
        table = [*lines, *rows, r"\bottomrule", r"\end{tabular}"]
        caption = rf"\caption{{{latex_text(self.title.rstrip(':') or self.name.capitalize())}}}"
        return "\n".join([r"\begin{table}", r"\centering", caption, *table, r"\end{table}"]) + "\n"


def is_number(cell: str) -> bool:
    return isinstance(number(PAIR.sub(r"\1", cell)), int | float)


def number(cell: str) -> int | float | str | None:
    """Return a cell without its marks, as a number if it is one; None for "-"."""
    text = re.sub(r"\*\*|`", "", cell)
    digits = text.replace(",", "")
    try:
        return None if text == "-" else int(digits) if digits.isdecimal() else float(digits)
    except ValueError:
        return text


def latex_text(text: str) -> str:
    """Return `text` with LaTeX's special characters escaped, and its bold and code as commands."""
    text = "".join(LATEX.get(character, character) for character in text)
    text = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", text)  # a minus, not a hyphen
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
    text = re.sub(r"`(.+?)`", r"\\texttt{\1}", text)
    return text.replace("--", "-{}-")  # two hyphens of a flag would become a dash
