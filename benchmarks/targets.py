"""The targets of this project's speed, each with what a benchmark measured: a table of benchmarks.tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HEADER = ["what", "target", "measured", "met", "command: `python -m benchmarks.` ..."]
SIZES = (64, 128, 224)


@dataclass(frozen=True)
class Target:
    """`wanted` holds a bound for each of the `values` that the rows must have."""

    what: str
    command: str
    values: Callable[[list[dict]], list[tuple[float, dict] | None]]  # each with its row; None: not measured
    wanted: tuple[float, ...]
    at_least: bool = False
    form: str = ",.0f"

    def line(self, rows: list[dict]) -> list[str]:
        found = self.values(rows)
        values = [None if pair is None else pair[0] for pair in found]
        measured = " / ".join("-" if value is None else format(value, self.form) for value in values)
        wanted = ("at least " if self.at_least else "at most ") + " / ".join(f"{w:g}" for w in self.wanted)
        return [self.what, wanted, measured, self.met(values), f"`{self.command}`"]

    def met(self, values: list[float | None]) -> str:
        if None in values:
            return ""
        pairs = zip(values, self.wanted, strict=True)
        return "yes" if all(v >= w if self.at_least else v <= w for v, w in pairs) else "no"


def column(name: str, benchmark: str, wanted: dict, sizes: tuple = SIZES) -> Callable:
    """Return a function that finds column `name` of the row of `benchmark` at each size with `wanted`."""

    def find(rows: list[dict]) -> list[tuple[float, dict] | None]:
        found = []
        for size in sizes:
            fits = {"benchmark": benchmark} | wanted | ({"size": size} if size else {})
            matching = [row for row in rows if fits.items() <= row.items() and row.get(name) is not None]
            found.append((matching[-1][name], matching[-1]) if matching else None)
        return found

    return find


def loader(name: str, augmentation: str, row: str, sizes: tuple = SIZES) -> Callable:
    return column(name, "loader", {"augmentation": augmentation, "loader": row, "workers": 1}, sizes)


def python_step(name: str, precision: str) -> Callable:
    """Find a column of the step of a ResNet-50 of width 1."""
    wanted = {"arch": "resnet50", "narrow": True, "loop": "project", "precision": precision}
    return column(name, "step", wanted, (None,))


def gpu_step(name: str, **wanted: object) -> Callable:
    wanted = {"arch": "resnet50", "narrow": False, "loop": "project", "variant": ""} | wanted
    find = column(name, "step", wanted)
    return lambda rows: find([row for row in rows if row.get("cuda")])


LOADER, STEP = "loader --data-dir DIR", "step"
AT = "at 64 / 128 / 224 px"
TARGETS = (
    Target("host reads in a training step", STEP, python_step("host_reads", "bf16"), (0,)),
    Target("foreach calls over mixed dtypes", STEP, python_step("mixed_foreach_calls", "bf16"), (0,)),
    Target("ATen calls of a step without views", STEP, python_step("aten_calls", "bf16"), (605,)),
    Target(
        "Python of a step, x the bare loop", STEP, python_step("cpu_times_bare", "fp32"), (1.05,), form=".3f"
    ),
    Target(f"step {AT} on a GPU, x the bare loop", STEP, gpu_step("times_bare"), (1.03,) * 3, form=".3f"),
    Target(f"step {AT} on a GPU, x timm's", STEP, gpu_step("times_timm"), (1,) * 3, form=".3f"),
    Target(
        f"step {AT} on a GPU with --compile, x eager's speed",
        f"{STEP} --variants compile",
        gpu_step("times_faster_than_default", variant="compile"),
        (1,) * 3,
        at_least=True,
        form=".2f",
    ),
    Target(
        f"scoring {AT}, packed: CPU us an image",
        LOADER,
        loader("cpu_us", "evaluation", "packed"),
        (50, 70, 120),
    ),
    Target(
        "64 px, crop + flip, from JPEG: CPU us", LOADER, loader("cpu_us", "basic", "packed", (64,)), (150,)
    ),
    Target(
        "64 px, crop + flip, from raw: CPU us", LOADER, loader("cpu_us", "basic", "packed, raw", (64,)), (60,)
    ),
    Target("64 px, full, from raw: CPU us", LOADER, loader("cpu_us", "full", "packed, raw", (64,)), (130,)),
    Target(
        f"crop + flip {AT}: torchvision's CPU time (PIL), x ours",
        LOADER,
        loader("packed_saves_cpu", "basic", "torchvision, PIL"),
        (10, 4.5, 2.3),
        at_least=True,
        form=".1f",
    ),
    Target(
        f"full {AT}: CPU time from full-size JPEGs, x packed",
        LOADER,
        loader("packed_saves_cpu", "full", "full-size"),
        (6, 3.5, 2),
        at_least=True,
        form=".1f",
    ),
    Target(
        f"crop + flip {AT}: FFCV's CPU time (side 500), x ours",
        LOADER,
        loader("packed_saves_cpu", "basic", "FFCV, side 500"),
        (1, 1, 1),
        at_least=True,
        form=".1f",
    ),
    Target(
        "packing three sides: CPU ms an image",
        "storage --data-dir DIR",
        column("cpu_ms", "packing", {}, (None,)),
        (8,),
        form=".1f",
    ),
)


def targets(rows: list[dict]) -> tuple[list[list[str]], list[dict]]:
    """Return the cells of the table, the header first, and the rows they come from."""
    used = [pair[1] for target in TARGETS for pair in target.values(rows) if pair is not None]
    return [HEADER, *(target.line(rows) for target in TARGETS)], used
