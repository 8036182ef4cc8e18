"""`Study`: a question, base flags, variants that change some of them, and seeds. studies.py has the studies.

Flags are dictionaries, {"mixup_alpha": 0.2, "ema": False}, with the names and values of train.py's flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from base import flags
from base.config_file import RECIPES
from base.errors import UsageError

Flags = dict[str, Any]
PRESETS = ("full", "cpu", "smoke")
GENERATED = ("digits", "synthetic")  # datasets that need no directory
FINAL = "final"  # folder of a run with the scores of its last epoch, from validate.py
# Both presets save only at the end of a run. Without workers, a CPU repeats its own bits. It computes in bf16
# if it has the instructions: 1.3 to 2 times as fast.
CPU = {"device": "cpu", "amp": "auto", "num_workers": 0, "save_every": 100, "eval_every": 2}
SMOKE = {"dataset": "synthetic:classes=4,train=64,val=16,size=32", "epochs": 3, "device": "cpu", "amp": "off"}
SMOKE |= {"num_workers": 0, "save_every": 100}
SMOKE_DROPS = ("split", "class_list", "subset", "subset_size", "phase_epochs", "data_dir", "init_from")
SMOKE_DROPS += ("reset_head", "freeze_epochs")  # which need the weights
# A study's image size -> that of the smoke preset. ViT needs multiples of 16.
SMOKE_SIZES = {32: 32, 64: 16, 128: 24, 160: 32, 192: 40, 224: 48}
SMOKE_ARCHS = {"resnet50": "resnet_tiny", "resnet34": "resnet_tiny", "resnet18": "resnet_tiny"}


@dataclass(frozen=True)
class Run:
    """One variant with one seed; `study` is the name of the study's directory."""

    study: str
    variant: str
    seed: int
    flags: Flags
    scoring: tuple[str, ...] = ()  # of validate.py

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """The first variant is the baseline that the others are compared with. A single one is an A/A test."""

    name: str
    question: str
    variants: dict[str, Flags]  # name -> the flags that set it apart from the others
    base: Flags = field(default_factory=dict)  # flags of every variant
    recipe: str = ""  # a file of recipes/; the base overrides its flags
    grid: tuple[str, ...] = ()  # flags, if the variants are all combinations of their values: main effects
    metric: str = "val_top1"  # the compared column of metrics.jsonl, chosen before any run
    controls: tuple[str, ...] = ()  # variants without a verdict, such as those chosen after seeing scores
    scoring: tuple[str, ...] = ()  # flags of validate.py, beside the run's own
    worth: float = 0.5  # the difference worth seeing, in points: decides how many seeds a pilot asks for
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    notes: str = ""  # one per line
    commands: tuple[str, ...] = ()  # to try on a finished run; {best} and {data} are filled in
    source: str = ""  # the document that asked the question
    published: str = ""  # what the document concluded
    published_scores: dict[str, str] = field(default_factory=dict)  # variant -> published result
    cpu: Flags = field(default_factory=dict)  # overrides the base in the CPU preset; empty: there is none
    cpu_variants: dict[str, Flags] = field(default_factory=dict)  # variant -> its flags in the CPU preset
    cpu_title: str = ""

    @property
    def primary(self) -> tuple[str, ...]:
        """The variants that get a verdict: not the first one or `controls`; none with `grid` or `scoring`."""
        others = () if self.grid or self.scoring else [*self.variants][1:]
        return tuple(name for name in others if name not in self.controls)

    def title(self, preset: str) -> str:
        """Return the heading, which says how a preset scales the study down."""
        scale = {
            "full": "",
            "cpu": f", scaled down for a CPU: {self.cpu_title}",
            "smoke": ", smoke test: tiny sizes, the scores mean nothing",
        }
        return f"`{self.name}`{scale[preset]}"

    def directory(self, preset: str) -> str:
        return self.name if preset == "full" else f"{self.name}-{preset}"

    def runs(self, preset: str = "full", seeds: Sequence[int] = (), extra: Flags | None = None) -> list[Run]:
        """Return every variant with every seed, seed by seed, so that an unfinished study can be compared."""
        if preset == "cpu" and not self.cpu:
            raise UsageError(f"{self.name} has no CPU preset", "run it in full, or with --smoke")
        chosen = {variant: self.flags_of(variant, preset, extra) for variant in self.variants}
        return [
            Run(self.directory(preset), variant, seed, values | {"seed": seed}, self.scoring)
            for seed in seeds or self.seeds
            for variant, values in chosen.items()
        ]

    def flags_of(self, variant: str, preset: str = "full", extra: Flags | None = None) -> Flags:
        """Return the flags of `variant`; `extra` overrides the base, but not the variant's own flags."""
        base = self.base | CPU | self.cpu if preset == "cpu" else self.base
        chosen = base | (extra or {}) | self.own_flags(variant, preset)
        values = recipe_flags(self.recipe) | chosen if self.recipe else chosen
        values = smoke(values) if preset == "smoke" else values
        if not self.recipe:
            return values
        # Beside the chosen flags, some of the recipe's may have no effect, and train.py would refuse them.
        config, _ = flags.parse(flags.train_parser(), flags.to_argv(values))
        idle = flags.idle_flags(config) - chosen.keys()
        return {name: value for name, value in values.items() if name not in idle}

    def grid_values(self, flag: str) -> list[str]:
        return sorted({own[flag] for own in self.variants.values()}, key=float)

    def own_flags(self, variant: str, preset: str) -> Flags:
        own = self.variants[variant]
        return self.cpu_variants.get(variant, own) if preset == "cpu" else own


def data_flags(words: Sequence[str], dataset: str, directory: str) -> list[str]:
    """Return --data-dir for a run with the flags `words`, whose own may name a sibling of {data}."""
    own = next((word for word in words if word.startswith("--data-dir=")), "")
    if not own and dataset.partition(":")[0] in GENERATED:
        return []
    return [(own or "--data-dir={data}").replace("{data}", directory)]


def recipe_flags(name: str) -> Flags:
    """Return the flags that a recipe sets, except for the data directory, which the runner sets."""
    config, given = flags.parse(flags.train_parser(), [f"--config={RECIPES / name}.yaml"])
    return {flag: getattr(config, flag) for flag in given - {"config", "data_dir"}}


def smoke(values: Flags) -> Flags:
    """Scale `values` down to a run of a second or two: generated data, small images and networks."""
    small = {name: value for name, value in values.items() if name not in SMOKE_DROPS}
    sizes = small.get("resize_schedule", (64, 128, 224))
    arch = small.get("arch", "resnet50")
    small |= {"resize_schedule": [SMOKE_SIZES[px] for px in sizes], "arch": SMOKE_ARCHS.get(arch, arch)}
    if "warmup_epochs" in small:
        small["warmup_epochs"] = 1
    if "plateau_patience" in small:
        small["plateau_patience"] = 0
    if "batch_size" in small:
        small["batch_size"] = max(4, int(small["batch_size"]) // 16)
    if "phase_batch_sizes" in small:
        small["phase_batch_sizes"] = [max(4, size // 16) for size in small["phase_batch_sizes"]]
    return small | SMOKE


def grid(baseline: dict[str, str], **values: tuple[str, ...]) -> dict[str, Flags]:
    """Return the variants for every combination of `values`, {flag: its values}, with `baseline` first.

    Values are text, as typed on a command line, because they become part of directory names.
    """
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    combinations.sort(key=lambda chosen: chosen != baseline)
    names = ["_".join(f"{flag.replace('_', '-')}={value}" for flag, value in c.items()) for c in combinations]
    return dict(zip(names, combinations, strict=True))
