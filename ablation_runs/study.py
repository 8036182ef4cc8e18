"""What a study is: a question, a base command, variants that differ in the flags named, seeds.

The studies themselves are data in studies.py; presets that scale them down to a small machine are
here. Nothing is started and no result is read.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from base import flags
from base.errors import UsageError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# Training sizes of the documents -> px at which the smoke preset stands in for them. ViT needs multiples of 16.
SMOKE_SIZES = {"32": "32", "64": "16", "128": "24", "160": "32", "192": "40", "224": "48"}
SMOKE_ARCHS = {"resnet50": "resnet_tiny", "resnet34": "resnet_tiny", "resnet18": "resnet_tiny"}
SMOKE = """--dataset synthetic:classes=4,train=64,val=16,size=32 --epochs 3 --num-workers 0 --save-every 100
           --device cpu --amp off"""
SMOKE_DROPS = ("split", "class-list", "subset", "subset-size", "phase-epochs", "data-dir")
CPU = (
    """--dataset imagenet --subset --arch resnet18 --num-workers 0 --save-every 100 --device cpu --amp bf16"""
)
PRESETS = ("full", "cpu", "smoke")


@dataclass(frozen=True)
class Variant:
    """One row of a study's table: `flags` is all that sets it apart from the others."""

    name: str
    flags: str = ""
    cpu: str | None = None  # stands for `flags` under the CPU preset
    reported: str = ""  # the document's own figure
    factors: tuple[tuple[str, str], ...] = ()  # a grid's coordinates: (parameter, value)


@dataclass(frozen=True)
class Study:
    """The first variant is the one that the others are compared with."""

    name: str
    source: str  # the document it answers, or "" where it is our own
    question: str
    variants: tuple[Variant, ...]
    base: str = ""  # flags of every variant
    recipe: str = ""  # a file of recipes/, whose flags lie under the base
    score: str = "val_top1"  # the column compared, chosen before any run
    reported: str = ""  # what the document concluded
    notes: tuple[str, ...] = ()
    cpu: str = ""  # laid over `base` under the CPU preset; "" where there is none
    cpu_title: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    afterwards: tuple[str, ...] = ()  # commands on a finished run; {best} and {data} are filled in

    def title(self, preset: str) -> str:
        """The study's heading, which says where it is not the study at its full size."""
        scaled = {
            "full": "",
            "cpu": f", scaled down for a CPU: {self.cpu_title}",
            "smoke": ", smoke test: tiny sizes, the figures mean nothing",
        }
        return f"`{self.name}`{scaled[preset]}"

    def directory(self, preset: str = "full") -> str:
        return self.name if preset == "full" else f"{self.name}-{preset}"

    def runs(self, preset: str = "full", seeds: tuple[int, ...] | None = None, extra: str = "") -> list[Run]:
        """Every variant with every seed, one seed after the other: a study cut short still compares."""
        if preset == "cpu" and not self.cpu:
            raise UsageError(f"{self.name} has no CPU preset", "run it in full, or with --smoke")
        return [
            Run(
                self.directory(preset),
                variant.name,
                seed,
                [*self.flags(variant, preset, extra), "--seed", str(seed)],
            )
            for seed in (seeds or self.seeds)
            for variant in self.variants
        ]

    def flags(self, variant: Variant, preset: str = "full", extra: str = "") -> list[str]:
        """train.py's flags for `variant`; `extra` is laid over the base, under what the variant names."""
        recipe = shlex.join(recipe_flags(self.recipe)) if self.recipe else ""
        layers = (self.base, extra, variant.flags)
        if preset == "cpu":
            layers = (self.base, CPU, self.cpu, extra, variant.flags if variant.cpu is None else variant.cpu)
        chosen = merged(recipe, *layers)
        chosen = smoke(chosen) if preset == "smoke" else chosen
        idle = idle_in(chosen) - merged(*layers).keys() if recipe else ()
        return as_list({name: value for name, value in chosen.items() if name not in idle})


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    study: str  # as the directory is called
    variant: str
    seed: int
    flags: list[str]

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


def recipe_flags(name: str) -> list[str]:
    """A recipe spelled out, so that a command says all it does; where the data lies is the runner's business."""
    values = flags.read_recipe(flags.train_parser(), str(RECIPES / f"{name}.yaml"))
    return [as_typed(flag, value) for flag, value in values.items() if flag != "data_dir"]


def as_typed(flag: str, value) -> str:
    name = flags.dashed(flag)
    if isinstance(value, bool):
        return name if value else f"--no-{name[2:]}"
    items = value if isinstance(value, tuple) else (value,)
    return f"{name}=" + ",".join(
        "on" if item is True else "off" if item is False else str(item) for item in items
    )


def idle_in(chosen: dict[str, str | None]) -> set[str]:
    """What `chosen` names in vain: train.py would refuse it, and lets it go where a recipe brings it."""
    config, _ = flags.parse(flags.train_parser(), as_list(chosen))
    return {name.replace("_", "-") for name in flags.idle_flags(config)}


def grid(defaults: dict[str, str], **values: tuple[str, ...]) -> tuple[Variant, ...]:
    """Every combination of `values` ({flag: its values}); the one with all `defaults` comes first."""
    combinations: list[dict[str, str]] = [{}]
    for flag, options in values.items():
        combinations = [
            {**some, flag.replace("_", "-"): option} for some in combinations for option in options
        ]
    combinations.sort(key=lambda chosen: chosen != defaults)
    return tuple(
        Variant(
            name="_".join(f"{flag}={value}" for flag, value in chosen.items()),
            flags=" ".join(f"--{flag} {value}" for flag, value in chosen.items()),
            factors=tuple(chosen.items()),
        )
        for chosen in combinations
    )


def merged(*texts: str) -> dict[str, str | None]:
    """Command lines laid over each other, later ones above: {flag without dashes: value, None for a switch}.

    `--x` takes the place of `--no-x`, and the other way round.
    """
    laid: dict[str, str | None] = {}
    for text in texts:
        words = shlex.split(text)
        for i, word in enumerate(words):
            if not word.startswith("--"):
                continue
            name, equals, value = word[2:].partition("=")
            if not equals:
                follows = words[i + 1] if i + 1 < len(words) else "--"
                value = None if follows.startswith("--") else follows
            laid.pop(name.removeprefix("no-") if name.startswith("no-") else f"no-{name}", None)
            laid[name] = value
    return laid


def as_list(chosen: dict[str, str | None]) -> list[str]:
    return [word for name, value in chosen.items() for word in (f"--{name}", value) if word is not None]


def smoke(chosen: dict[str, str | None]) -> dict[str, str | None]:
    """The same run in a second or two: other data, fewer epochs, smaller images, batches and networks."""
    small = {name: value for name, value in chosen.items() if name not in SMOKE_DROPS}
    sizes = small.get("resize-schedule", "64,128,224").split(",")
    small["resize-schedule"] = ",".join(SMOKE_SIZES[size] for size in sizes)
    small["arch"] = SMOKE_ARCHS.get(small.get("arch", "resnet50"), small.get("arch", "resnet50"))
    if "warmup-epochs" in small:
        small["warmup-epochs"] = "1"
    for name in ("batch-size", "phase-batch-sizes"):
        if name in small:
            small[name] = ",".join(str(max(4, int(size) // 16)) for size in small[name].split(","))
    return merged(shlex.join(as_list(small)), SMOKE)
