"""Every flag: names, types, defaults and what they may not be; nothing here needs torch.

The parser holds the only copy of each default. `parse` returns a frozen `TrainConfig` and the set
of flags that were typed: a resumed run takes all others from its checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errors import UsageError

DATASETS = "imagenet, imagenet100, tiny-imagenet, cifar100, cifar10, digits, synthetic, hf:<name>"
ARCHS = ("resnet50", "resnet34", "resnet18", "preact_resnet50", "resnet_tiny", "efficientnet_b0",
         "mobilenet_v3_large", "vit_b_16", "swin_t")  # fmt: skip
OPTIMIZERS = ("adamw", "sgd", "adam", "rmsprop", "lamb")
SCHEDULES = ("onecycle", "cosine", "restarts", "step", "triangular2", "plateau", "constant")
AUGMENT_SETS = {"full": "rrc,flip,affine,jitter,dropout", "basic": "rrc,flip", "none": ""}
AUGMENTS = {"rrc": "", "padcrop": ":N", "flip": "", "affine": "", "jitter": "[:N]", "dropout": "",
            "cutout": ":N", "randaugment": "", "trivialaugment": ""}  # name -> its argument  # fmt: skip

# Flags that say where and how a run happens, not what is learned: free to change on resume.
FREE_ON_RESUME = frozenset({
    "data_dir", "num_workers", "save_dir", "resume", "allow_change", "overwrite", "save_every", "stop_after", "plot",
    "debug", "device", "tensorboard", "wandb", "config", "dry_run", "summary", "init_from", "reset_head",
    "allow_class_mismatch",
})  # fmt: skip


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, and the examples of the epilog kept on lines of their own."""


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates and raises `UsageError` where it would exit."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str):
        raise UsageError(message, f"python {self.prog} --help lists every flag with its range")


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False):
    """An argparse type: a finite `kind` in [low, high]; an open end excludes the bound itself."""
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
    allowed = f"{'whole number' if kind is int else 'number'} in {left}{low}, {high}{right}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {allowed}") from None
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not (math.isfinite(value) and inside):
            raise argparse.ArgumentTypeError(f"{text} is not a {allowed}")
        return value

    return parse


def listing(item: Callable[[str], Any]):
    """An argparse type: comma-separated items, as a tuple."""

    def parse(text: str):
        return tuple(item(part.strip()) for part in str(text).split(",") if part.strip())

    return parse


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def save_interval(text: str) -> tuple[float, str]:
    """'2' or '2ep': every 2 epochs; '15min' or '30s': as long after a save, as well as after every epoch."""
    for unit, minutes in (("min", 1), ("s", 1 / 60)):
        if text.endswith(unit):
            return above_zero(text.removesuffix(unit)) * minutes, "min"
    return positive(text.removesuffix("ep")), "ep"


def parse_augment(text: str) -> tuple[tuple[str, int | None], ...]:
    """'full', 'basic', 'none' or names such as 'padcrop:4,flip' -> ((name, N or None), ...)."""
    steps = []
    for part in AUGMENT_SETS.get(text, text).split(","):
        name, _, argument = part.strip().partition(":")
        if not name:
            continue
        if name not in AUGMENTS:
            raise argparse.ArgumentTypeError(f"unknown augmentation {name!r}; there are {', '.join(AUGMENTS)}")
        if AUGMENTS[name] == ":N" and not argument:
            raise argparse.ArgumentTypeError(f"{name} needs a size in px, such as {name}:4")
        if argument and not AUGMENTS[name]:
            raise argparse.ArgumentTypeError(f"{name} takes no argument")
        steps.append((name, number(int, 1)(argument) if argument else None))
    return tuple(steps)


def _augment(text: str) -> str:
    parse_augment(text)
    return text


positive, natural = number(int, 1), number(int, 0)
above_zero, from_zero = number(float, 0, open_low=True), number(float, 0)
fraction = number(float, 0, 1, open_high=True)
Switch = argparse.BooleanOptionalAction


def add_dataset_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which images: for every command that reads data. Returns the group, for flags on how they are read."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-dir", default="./data/imagenet", metavar="DIR", help="the dataset on disk, or a packed copy of it")
    add("--dataset", default="imagenet", metavar="NAME", help=f"one of {DATASETS}; any class folders are 'imagenet'")
    add("--split", default="official", choices=("official", "70-30"), help="70-30 pools tiny-imagenet's train and val")
    add("--class-list", default="", metavar="FILE", help="use only these classes (imagenet, imagenet100)")
    add("--allow-class-mismatch", action="store_true", help="accept a val/ that lacks some of train's classes")
    add("--subset", action=Switch, default=False, help="only a fixed, class-balanced draw of --subset-size images")
    add("--subset-size", type=positive, default=10_000, metavar="N", help="images in it; validation gets a tenth")
    return group


def add_data_args(parser: argparse.ArgumentParser) -> None:
    add = add_dataset_args(parser).add_argument
    add("--augment", type=_augment, default="full", metavar="LIST",
        help=f"full, basic, none, or names in order: {', '.join(n + a for n, a in AUGMENTS.items())}")  # fmt: skip
    add("--on-bad-image", default="fail", choices=("fail", "skip"),
        help="skip: train on another image of the class and count it; validation always fails")  # fmt: skip
    add("--num-workers", type=number(int, 0, 1024), default=8, metavar="N", help="loader processes per rank")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", choices=ARCHS, help="architecture")
    add("--drop-path-rate", type=fraction, default=0.2, metavar="P", help="stochastic depth of the last block")
    add("--use-blurpool", action="store_true", help="antialiased downsampling (CC BY-NC-SA package, 1.26x the work)")
    add("--head", default="conv", choices=("conv", "linear"), help="classifier: 1x1 convolution or linear layer")
    add("--stem", default="imagenet", choices=("imagenet", "small", "d"), help="small: 3x3 without pool, for 32 px")
    add("--init-from", default="", metavar="FILE", help="start from these weights (ours, torchvision's, ...)")
    add("--reset-head", action="store_true", help="with --init-from: new classifier, for other classes")


def add_phase_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("phases").add_argument
    add("--epochs", type=positive, default=90, metavar="N", help="epochs over all phases")
    add("--batch-size", type=positive, default=256, metavar="N", help="global batch of phase 1, halved at each size")
    add("--resize-schedule", type=listing(number(int, 8, 4096)), default=(64, 128, 224), metavar="PX,PX,...",
        help="image size of each phase; one size is no progression")  # fmt: skip
    add("--phase-epochs", type=listing(positive), default=None, metavar="N,N,...",
        help="epochs of each phase, as weights when they do not add up to --epochs; default 30,20,40 or equal parts")  # fmt: skip
    add("--phase-batch-sizes", type=listing(positive), default=None, metavar="N,N,...", help="their global batches")
    add("--phase-mix", type=listing(_on_off), default=None, metavar="on|off,...", help="mixing and drop-path by phase")
    add("--accumulate", type=positive, default=1, metavar="K", help="split each global batch into K pieces")


def add_optim_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="optimizer")
    add("--lr", type=above_zero, default=3e-4, metavar="LR", help="peak learning rate of the schedule")
    add("--momentum", type=fraction, default=0.9, metavar="M", help="of sgd and rmsprop; never cycled")
    add("--nesterov", action="store_true", help="with --optimizer sgd")
    add("--weight-decay", type=from_zero, default=1e-4, metavar="W", help="of weights, not of biases and norms")
    add("--schedule", default="onecycle", choices=SCHEDULES, help="learning rate over the steps")
    add("--warmup-epochs", type=from_zero, default=5.0, metavar="N", help="linear warm-up of --schedule cosine")
    add("--cycles", type=positive, default=3, metavar="N", help="cycles of restarts and triangular2")
    add("--lr-scale", default="none", choices=("none", "sqrt", "linear"), help="how lr follows the phase's batch")
    add("--clip-norm", type=from_zero, default=1.0, metavar="G", help="largest gradient norm (or value); 0: none")
    add("--clip-mode", default="norm", choices=("norm", "value"), help="what --clip-norm limits")
    add("--loss", default="ce", choices=("ce", "bce"), help="cross-entropy, or binary cross-entropy per class")
    add("--l1", type=from_zero, default=0.0, metavar="L", help="weight of an L1 penalty on the weights")
    add("--label-smoothing", type=fraction, default=0.1, metavar="E", help="inside the mixed targets")
    add("--mixup-alpha", type=from_zero, default=0.2, metavar="A", help="Beta(A, A) of MixUp; 0: off")
    add("--cutmix-alpha", type=from_zero, default=1.0, metavar="A", help="Beta(A, A) of CutMix; 0: off")
    add("--ema", action=Switch, default=True, help="keep and score an average of the weights")
    add("--ema-decay", type=fraction, default=0.9999, metavar="D", help="per step")
    add("--ema-ramp", action=Switch, default=True, help="let the decay grow as (1 + n) / (10 + n)")
    add("--ema-half-life", type=above_zero, default=None, metavar="EPOCHS", help="sets --ema-decay from the plan")


def add_device_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision; auto: if it is fast")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of everything random")
    add("--compile", action="store_true", help="torch.compile the training forward")
    add("--deterministic", action="store_true", help="only kernels that give the same bits again")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks")


def add_asking_args(parser: argparse.ArgumentParser) -> None:
    """For commands that only ask a trained model."""
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision; auto: if it is fast")
    add("--batch-size", type=positive, default=64, metavar="N", help="images at a time")
    add("--num-workers", type=number(int, 0, 1024), default=8, metavar="N", help="loader processes")
    add("--debug", action="store_true", help="tracebacks for errors")


def add_run_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--save-dir", default="./checkpoints", metavar="DIR", help="where this run lives")
    add("--resume", default="", metavar="PATH|auto", help="go on from a checkpoint; auto: the newest sound one")
    add("--allow-change", type=listing(str), default=(), metavar="FLAG,...", help="what may differ on --resume")
    add("--overwrite", action="store_true", help="delete the run that --save-dir holds")
    add("--save-every", type=save_interval, default=(1, "ep"), metavar="N|Nmin|Ns",
        help="epochs, minutes or seconds between saves")  # fmt: skip
    add("--stop-after", type=positive, default=None, metavar="STEP", help="stop there, saved, as a stop signal would")
    add("--eval-every", type=positive, default=1, metavar="N", help="epochs between validations")
    add("--early-stop-patience", type=positive, default=None, metavar="N",
        help="validations at the last size without a better score before stopping")  # fmt: skip
    add("--plot", action="store_true", help="draw learning curves into --save-dir/plots while training")
    add("--tensorboard", action="store_true", help="log to --save-dir/tensorboard as well")
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases as well")
    add("--summary", action="store_true", help="print the layers at every size, then exit")
    add("--dry-run", action="store_true", help="print the plan, try two steps at every size, then exit")
    add("--config", default="", metavar="FILE", help="YAML of flag defaults; the command line wins")
    add("--debug", action="store_true", help="tracebacks for errors")


def build_parser(prog: str, description: str, epilog: str = "", groups: tuple[Callable, ...] = ()) -> Parser:
    parser = Parser(prog=prog, description=description, epilog=epilog)
    for add_group in groups:
        add_group(parser)
    return parser


TRAIN_GROUPS = (add_data_args, add_model_args, add_phase_args, add_optim_args, add_device_args, add_run_args)


class Given(frozenset):
    """Names of the flags given, on the command line or by --config; `by_hand`: on the command line."""

    by_hand: frozenset[str] = frozenset()


def parse(parser: Parser, argv: list[str] | None) -> tuple[Any, Given]:
    """The frozen config, and the names of the flags that were given."""
    # Not parse_args([]): a script's positional arguments have no default.
    defaults = {a.dest: a.default for a in parser._actions if a.default is not argparse.SUPPRESS}
    by_hand = _typed(parser, argv)
    recipe = _typed(parser, yaml_arguments(by_hand["config"], defaults)) if by_hand.get("config") else {}
    given = Given(recipe | by_hand)
    given.by_hand = frozenset(by_hand)
    return make_config(defaults | recipe | by_hand), given


def make_config(values: dict[str, Any]) -> Any:
    """A frozen dataclass of `values`: every flag is an attribute, and nothing changes one later."""
    cls = dataclasses.make_dataclass("TrainConfig", list(values), frozen=True)
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _typed(parser: Parser, argv: list[str] | None) -> dict[str, Any]:
    saved = {action: action.default for action in parser._actions}
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        # Intermixed: flags may stand between the images that predict.py is given.
        return vars(parser.parse_intermixed_args(argv))
    finally:
        for action, default in saved.items():
            action.default = default


def yaml_arguments(path: str, known: dict[str, Any]) -> list[str]:
    """The YAML file as a command line, so that its values meet the same checks."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}", f"recipes/ holds {_recipes()}") from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"--config {path} is not YAML: {' '.join(str(error).split())}", "write one `flag: value` a line"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no flags", "write one `flag: value` a line")
    arguments, of_train = [], vars(build_parser("train.py", "", "", TRAIN_GROUPS).parse_args([]))
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name.replace("-", "_") in of_train.keys() - known.keys():
            continue  # a recipe serves lr_finder.py too, which has no --plot
        if name.replace("-", "_") not in known or name == "config":
            raise UsageError(
                f"--config {path}: unknown key {key!r}", "the keys are train.py's flags without the dashes"
            )
        if isinstance(value, bool):
            if known[name.replace("-", "_")] != value:
                arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            arguments.append(f"--{name}={text}")
    return arguments


def _recipes() -> str:
    return ", ".join(sorted(p.name for p in (Path(__file__).parent / "recipes").glob("*.yaml"))) or "no recipe"


def check_ranks(variables: Mapping[str, str]) -> None:
    """Refuse half of torchrun's variables: such a process would train alone and save nothing."""
    ranks = {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in variables}
    whole = "RANK" in ranks and "WORLD_SIZE" in ranks
    numbers = all(value.isdecimal() for value in ranks.values())
    if numbers and ((whole and int(ranks["RANK"]) < int(ranks["WORLD_SIZE"])) or all(map(_alone, ranks.items()))):
        return
    shown = ", ".join(f"{name}={value}" for name, value in ranks.items())
    raise UsageError(f"the environment has {shown}, which is no whole set of ranks",
                     "start with torchrun, or unset these variables")  # fmt: skip


def _alone(variable: tuple[str, str]) -> bool:
    return variable in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def check_train(config: Any, typed: Given) -> list[str]:
    """Refuse what cannot work together (exit 2); return the notes worth printing."""
    check_ranks(os.environ)
    phases = len(config.resize_schedule)
    if not phases:
        raise UsageError("--resize-schedule is empty", "give at least one size, such as --resize-schedule 224")
    for name in ("phase_epochs", "phase_batch_sizes", "phase_mix"):
        value = getattr(config, name)
        if value is not None and len(value) != phases:
            raise UsageError(f"{dashed(name)} has {len(value)} entries but there are {phases} phases",
                             "give one entry for each size of --resize-schedule")  # fmt: skip
    zoo = "resnet" not in config.arch
    idle = {
        "subset_size": not config.subset and "it needs --subset",
        "reset_head": not config.init_from and "it needs --init-from",
        "nesterov": config.optimizer != "sgd" and "it needs --optimizer sgd",
        "warmup_epochs": config.schedule != "cosine" and "it needs --schedule cosine",
        "cycles": config.schedule not in ("restarts", "triangular2") and "it needs --schedule restarts or triangular2",
        "ema_decay": (not config.ema and "EMA is off") or (config.ema_half_life and "--ema-half-life sets it"),
        "ema_ramp": not config.ema and "EMA is off",
        "ema_half_life": not config.ema and "EMA is off",
        "phase_epochs": phases == 1 and "there is one phase",
        "allow_change": not config.resume and "it needs --resume",
        "use_blurpool": zoo and f"{config.arch} has no place for it",
        "head": zoo and f"{config.arch} brings its own head",
        "stem": zoo and f"{config.arch} brings its own stem",
    }
    for name, reason in idle.items():
        if name in typed.by_hand and reason:  # what a recipe brings may be idled by hand
            raise UsageError(f"{dashed(name)} would do nothing: {reason}", f"leave {dashed(name)} out")
    if config.ema_half_life and config.ema_ramp and "ema_ramp" in typed:
        raise UsageError("--ema-ramp and --ema-half-life set the decay both", "leave one of the two out")
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "leave one of the two out")
    if config.schedule == "cosine" and config.warmup_epochs >= config.epochs:
        raise UsageError(f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of {config.epochs} epochs for the cosine",
                         "give a smaller --warmup-epochs, or 0")  # fmt: skip
    if config.nesterov and config.momentum == 0:
        raise UsageError("--nesterov needs a momentum", "give --momentum 0.9")
    notes = []
    if "momentum" in typed and config.optimizer not in ("sgd", "rmsprop"):
        notes.append(f"note: --momentum is not used by {config.optimizer}")
    return notes


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def plain(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values, home folder and all other surroundings left out."""
    values = dataclasses.asdict(config)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_args(config: Any) -> dict[str, Any]:
    """The data flags as `sources.layouts.index` takes them."""
    return {"dataset": config.dataset, "data_dir": config.data_dir, "split": config.split,
            "class_list": config.class_list or None, "allow_class_mismatch": config.allow_class_mismatch,
            "subset_size": config.subset_size if config.subset else None}  # fmt: skip
