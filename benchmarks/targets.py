"""The targets of this project's speed, each with what a benchmark measured: a table of benchmarks.tables."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = ["what", "target", "measured", "met", "command: `python -m benchmarks.` ..."]
SIZES = (64, 128, 224)


@dataclass(frozen=True)
class Target:
    """What a column should be in the rows that contain `wanted`: a bound for each of SIZES, or only one."""

    what: str
    column: str
    wanted: dict[str, object]
    bounds: tuple[float, ...]
    at_least: bool = False
    form: str = ",.0f"
    command: str = ""  # by default that of the benchmark
    gpu: bool = False  # only rows that were measured on a GPU count

    def found(self, rows: list[dict]) -> list[dict | None]:
        """Return the last fitting row at each size, by the names of the machines; None if there is none."""
        known = [r for r in rows if r.get(self.column) is not None and (r.get("cuda") or not self.gpu)]
        each = [{"size": size} for size in SIZES] if len(self.bounds) > 1 else [{}]
        wanted = [(self.wanted | size).items() for size in each]
        return [next((row for row in reversed(known) if w <= row.items()), None) for w in wanted]

    def line(self, rows: list[dict]) -> list[str]:
        values = [row and row[self.column] for row in self.found(rows)]
        measured = " / ".join("-" if value is None else format(value, self.form) for value in values)
        bounds = ("at least " if self.at_least else "at most ") + " / ".join(f"{b:g}" for b in self.bounds)
        command = self.command or COMMANDS[self.wanted["benchmark"]]
        return [self.what, bounds, measured, self.met(values), f"`{command}`"]

    def met(self, values: list[float | None]) -> str:
        if None in values:
            return ""
        pairs = zip(values, self.bounds, strict=True)
        return "yes" if all(v >= b if self.at_least else v <= b for v, b in pairs) else "no"


def loader(augmentation: str, name: str, **size: int) -> dict[str, object]:
    return {"benchmark": "loader", "workers": 1, "augmentation": augmentation, "loader": name} | size


COMMANDS = {"step": "step", "loader": "loader --data-dir DIR", "packing": "storage --data-dir DIR"}
STEP = {"benchmark": "step", "arch": "resnet50", "loop": "project", "variant": ""}
NARROW = STEP | {"narrow": True, "precision": "bf16"}  # of width 1: what is left is mostly Python
WIDE, COMPILED = STEP | {"narrow": False}, STEP | {"narrow": False, "variant": "compile"}
AT = "at 64 / 128 / 224 px"
FASTER = {"at_least": True, "form": ".1f"}
TARGETS = (
    Target("host reads in a training step", "host_reads", NARROW, (0,)),
    Target("foreach calls over mixed dtypes", "mixed_foreach_calls", NARROW, (0,)),
    Target("ATen calls of a step without views", "aten_calls", NARROW, (605,)),
    Target("Python of a step, x the bare loop", "cpu_times_bare", NARROW | {"precision": "fp32"}, (1.05,),
           form=".3f"),
    Target(f"step {AT} on a GPU, x the bare loop", "times_bare", WIDE, (1.03,) * 3, form=".3f", gpu=True),
    Target(f"step {AT} on a GPU, x timm's", "times_timm", WIDE, (1,) * 3, form=".3f", gpu=True),
    Target(f"step {AT} on a GPU with --compile, x eager's speed", "times_faster_than_default", COMPILED,
           (1,) * 3, at_least=True, form=".2f", gpu=True, command="step --variants compile"),
    Target(f"scoring {AT}, packed: CPU us an image", "cpu_us", loader("evaluation", "packed"), (50, 70, 120)),
    Target("64 px, crop + flip, from JPEG: CPU us", "cpu_us", loader("basic", "packed", size=64), (150,)),
    Target("64 px, crop + flip, from raw: CPU us", "cpu_us", loader("basic", "packed, raw", size=64), (60,)),
    Target("64 px, full, from raw: CPU us", "cpu_us", loader("full", "packed, raw", size=64), (130,)),
    Target(f"crop + flip {AT}: torchvision's CPU time (PIL), x ours", "packed_saves_cpu",
           loader("basic", "torchvision, PIL"), (10, 4.5, 2.3), **FASTER),
    Target(f"full {AT}: CPU time from full-size JPEGs, x packed", "packed_saves_cpu",
           loader("full", "full-size"), (6, 3.5, 2), **FASTER),
    Target(f"crop + flip {AT}: FFCV's CPU time (side 500), x ours", "packed_saves_cpu",
           loader("basic", "FFCV, side 500"), (1,) * 3, **FASTER),
    Target("packing three sides: CPU ms an image", "cpu_ms", {"benchmark": "packing"}, (8,), form=".1f"),
)  # fmt: skip


def targets(rows: list[dict]) -> tuple[list[list[str]], list[dict]]:
    """Return the cells of the table, the header first, and the rows they come from."""
    used = [row for target in TARGETS for row in target.found(rows) if row is not None]
    return [HEADER, *(target.line(rows) for target in TARGETS)], used
