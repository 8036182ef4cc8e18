"""Draw docs/pictures/layers.png, the modules in their layers: `python tests/draw_layers.py`."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from test_house import LAYERS, ROOT, imports, layer, modules

TITLES = ("base", "leaves", "parts", "made of parts", "the loop", "around it", "commands")
COLOURS = ("#9aa5b1", "#4c9f70", "#2a7fb8", "#117a8b", "#c0392b", "#8e5ea2", "#b8860b")


def node(name: str) -> str:
    """Return the box of module `name`: its own if LAYERS names the module, else that of its package."""
    if name.startswith("analysis.") and layer(name) < 6:
        shared = {1: "scores, ...", 2: "landscape_figures", 3: "predictions, ..."}
        return "analysis/" + shared.get(layer(name), name.removeprefix("analysis."))
    if name in LAYERS and layer(name):
        return name.replace(".", "/")
    return name.split(".", maxsplit=1)[0]


def boxes() -> dict[str, int]:
    return {node(name): layer(name) for name in modules() if layer(name) or node(name) == "base"}


def arrows() -> set[tuple[str, str]]:
    """Return the imports between boxes, without those of base and those that others imply."""
    found = {(node(a), node(b)) for a, path in modules().items() for b in imports(a, path) if layer(b)}
    below: dict[str, set[str]] = {}
    for a, b in found:
        if a not in (b, "base"):
            below.setdefault(a, set()).add(b)

    def reached(names: set[str]) -> set[str]:
        further = set().union(*(below.get(name, set()) for name in names))
        return further | reached(further) if further else further

    return {(a, b) for a, others in below.items() for b in others - reached(others)}


def places(nodes: dict[str, int], pairs: set[tuple[str, str]]) -> dict[str, tuple[float, int]]:
    """Return (x, layer) for each box; boxes stand near those they import."""
    x = {}
    for level in range(7):
        row = [name for name, where in sorted(nodes.items()) if where == level]
        below = {name: [x[b] for a, b in pairs if a == name and b in x] for name in row}
        row.sort(key=lambda name: sum(below[name]) / len(below[name]) if below[name] else 0.5)
        x |= {name: (k + 0.5) / len(row) for k, name in enumerate(row)}
    return {name: (x[name], nodes[name]) for name in nodes}


def main() -> None:
    pairs = arrows()
    place = places(boxes(), pairs)
    figure, axis = plt.subplots(figsize=(14, 7.4))
    for a, b in sorted(pairs):
        (x, y), (u, v) = place[a], place[b]
        bend = "arc3,rad=0.25" if y == v else "arc3,rad=0.04"
        style = {"arrowstyle": "-|>", "connectionstyle": bend, "lw": 0.9, "shrinkA": 12, "shrinkB": 12}
        style |= {"color": COLOURS[y], "alpha": 0.3 if y == 6 else 0.6}
        axis.annotate("", (u, v), (x, y), arrowprops=style)
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": COLOURS[y], "lw": 1.4}
        axis.text(x, y, name, ha="center", va="center", fontsize=9, bbox=box)
    for level, title in enumerate(TITLES):
        axis.text(-0.02, level, title, ha="right", va="center", fontsize=9, color=COLOURS[level])
    axis.set(
        xlim=(-0.1, 1),
        ylim=(-0.5, 6.5),
        title="An arrow: imports it, and whatever that imports. All import base",
    )
    axis.axis("off")
    figure.savefig(ROOT / "docs" / "pictures" / "layers.png", dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
