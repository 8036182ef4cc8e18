"""Every flag: names, types, defaults, what each one changes and when it cannot; nothing here needs torch.

The parser holds the only copy of each default. `parse` returns a frozen `TrainConfig` and the set
of flags that were typed: a resumed run takes all others from its checkpoint. Values from files meet
the same parser, and the values used are the ones that come out of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base import process
from base.errors import UsageError

DATASETS = "imagenet, imagenet100, tiny-imagenet, cifar100, cifar10, digits, synthetic, hf:<name>"
ARCHS = (
    "resnet50",
    "resnet34",
    "resnet18",
    "preact_resnet50",
    "resnet_tiny",
    "efficientnet_b0",
    "mobilenet_v3_large",
    "vit_b_16",
    "swin_t",
)
OPTIMIZERS = ("adamw", "sgd", "adam", "rmsprop", "lamb")
SCHEDULES = ("onecycle", "cosine", "restarts", "step", "triangular2", "plateau", "constant")
AUGMENT_SETS = {"full": "rrc,flip,affine,jitter,dropout", "basic": "rrc,flip", "none": ""}
AUGMENTS = {
    "rrc": "",
    "padcrop": ":N",
    "flip": "",
    "affine": "",
    "jitter": "[:N]",
    "dropout": "",
    "cutout": ":N",
    "randaugment": "",
    "trivialaugment": "",
}  # name -> its argument

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

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make an empty list of it
                self.error(f"{word}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UsageError(message, f"python {self.prog} --help lists every flag with its range")


def number(
    kind: type, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
):
    """An argparse type: a finite `kind` in [low, high]; an open end excludes the bound itself."""
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
    allowed = f"{'whole number' if kind is int else 'number'} in {left}{low}, {high}{right}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a {allowed}") from None
        inside = (value > low if open_low else value >= low) and (
            value < high if open_high else value <= high
        )
        if not inside or value == math.inf:  # a nan is never inside
            raise argparse.ArgumentTypeError(f"{text[:80]} is not a {allowed}")
        return value

    return parse


def listing(item: Callable[[str], Any]):
    """An argparse type: comma-separated items, as a tuple."""

    def parse(text: str):
        return tuple(item(part.strip()) for part in str(text).split(",") if part.strip())

    parse.joint = ","  # a list in a file becomes the text typed for it
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


save_interval.joint = ""


def parse_augment(text: str) -> tuple[tuple[str, int | None], ...]:
    """'full', 'basic', 'none' or names such as 'padcrop:4,flip' -> ((name, N or None), ...)."""
    steps = []
    for part in AUGMENT_SETS.get(text, text).split(","):
        name, _, argument = part.strip().partition(":")
        if not name:
            continue
        if name not in AUGMENTS:
            raise argparse.ArgumentTypeError(
                f"unknown augmentation {name!r}; there are {', '.join(AUGMENTS)}"
            )
        if AUGMENTS[name] == ":N" and not argument:
            raise argparse.ArgumentTypeError(f"{name} needs a size in px, such as {name}:4")
        if argument and not AUGMENTS[name]:
            raise argparse.ArgumentTypeError(f"{name} takes no argument")
        steps.append(
            (name, number(int, 1, 100 if name == "jitter" else 4096)(argument) if argument else None)
        )
    crops = [name for name, _ in steps if name in ("rrc", "padcrop")]
    if len(crops) > 1:
        raise argparse.ArgumentTypeError(f"{' and '.join(crops)}: an image is cropped once")
    return tuple(steps)


def _augment(text: str) -> str:
    parse_augment(text)
    return text


_augment.joint = ","
positive, natural = (
    number(int, 1, 10**9),
    number(int, 0, 10**9),
)  # beyond that, counts of steps leave what floats and files hold exactly
above_zero, from_zero = number(float, 0, open_low=True), number(float, 0)
fraction = number(float, 0, 1, open_high=True)
Switch = argparse.BooleanOptionalAction


def add_dataset_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which images: for every command that reads data. Returns the group, for flags on how they are read."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data-dir",
        default="./data/imagenet",
        metavar="DIR",
        help="the dataset on disk, or a packed copy of it",
    )
    add(
        "--dataset",
        default="imagenet",
        metavar="NAME",
        help=f"one of {DATASETS}; any class folders are 'imagenet'",
    )
    add(
        "--split",
        default="official",
        choices=("official", "70-30"),
        help="70-30 pools tiny-imagenet's train and val",
    )
    add("--class-list", default="", metavar="FILE", help="use only these classes (imagenet, imagenet100)")
    add(
        "--allow-class-mismatch", action="store_true", help="accept a val/ that lacks some of train's classes"
    )
    add(
        "--subset",
        action=Switch,
        default=False,
        help="only a fixed, class-balanced draw of --subset-size images",
    )
    add(
        "--subset-size",
        type=positive,
        default=10_000,
        metavar="N",
        help="images in it; validation gets a tenth",
    )
    return group


def add_data_args(parser: argparse.ArgumentParser) -> None:
    add = add_dataset_args(parser).add_argument
    add(
        "--augment",
        type=_augment,
        default="full",
        metavar="LIST",
        help=f"full, basic, none, or names in order: {', '.join(n + a for n, a in AUGMENTS.items())}",
    )
    add(
        "--on-bad-image",
        default="fail",
        choices=("fail", "skip"),
        help="skip: train on another image of the class and count it; validation always fails",
    )
    add("--num-workers", type=number(int, 0, 1024), default=8, metavar="N", help="loader processes per rank")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", choices=ARCHS, help="architecture")
    add(
        "--drop-path-rate", type=fraction, default=0.2, metavar="P", help="stochastic depth of the last block"
    )
    add(
        "--use-blurpool",
        action="store_true",
        help="antialiased downsampling (CC BY-NC-SA package, 1.26x the work)",
    )
    add(
        "--head",
        default="conv",
        choices=("conv", "linear"),
        help="classifier: 1x1 convolution or linear layer",
    )
    add(
        "--stem",
        default="imagenet",
        choices=("imagenet", "small", "d"),
        help="small: 3x3 without pool, for 32 px",
    )
    add("--init-from", default="", metavar="FILE", help="start from these weights (ours, torchvision's, ...)")
    add("--reset-head", action="store_true", help="with --init-from: new classifier, for other classes")


def add_phase_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("phases").add_argument
    add("--epochs", type=positive, default=90, metavar="N", help="epochs over all phases")
    add(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="global batch of phase 1, halved at each size",
    )
    add(
        "--resize-schedule",
        type=listing(number(int, 8, 4096)),
        default=(64, 128, 224),
        metavar="PX,PX,...",
        help="image size of each phase; one size is no progression",
    )
    add(
        "--phase-epochs",
        type=listing(positive),
        default=None,
        metavar="N,N,...",
        help="epochs of each phase, as weights when they do not add up to --epochs; default 30,20,40 or equal parts",
    )
    add(
        "--phase-batch-sizes",
        type=listing(positive),
        default=None,
        metavar="N,N,...",
        help="their global batches",
    )
    add(
        "--phase-mix",
        type=listing(_on_off),
        default=None,
        metavar="on|off,...",
        help="mixing and drop-path by phase",
    )
    add("--accumulate", type=positive, default=1, metavar="K", help="split each global batch into K pieces")


def add_optim_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="optimizer")
    add("--lr", type=above_zero, default=3e-4, metavar="LR", help="peak learning rate of the schedule")
    add("--momentum", type=fraction, default=0.9, metavar="M", help="of sgd and rmsprop; never cycled")
    add("--nesterov", action="store_true", help="with --optimizer sgd")
    add(
        "--weight-decay",
        type=from_zero,
        default=1e-4,
        metavar="W",
        help="of weights, not of biases and norms",
    )
    add("--schedule", default="onecycle", choices=SCHEDULES, help="learning rate over the steps")
    add(
        "--warmup-epochs",
        type=from_zero,
        default=5.0,
        metavar="N",
        help="linear warm-up of --schedule cosine",
    )
    add("--cycles", type=positive, default=3, metavar="N", help="cycles of restarts and triangular2")
    add(
        "--lr-scale",
        default="none",
        choices=("none", "sqrt", "linear"),
        help="how lr follows the phase's batch",
    )
    add(
        "--clip-norm",
        type=from_zero,
        default=1.0,
        metavar="G",
        help="largest gradient norm (or value); 0: none",
    )
    add("--clip-mode", default="norm", choices=("norm", "value"), help="what --clip-norm limits")
    add(
        "--loss", default="ce", choices=("ce", "bce"), help="cross-entropy, or binary cross-entropy per class"
    )
    add("--l1", type=from_zero, default=0.0, metavar="L", help="weight of an L1 penalty on the weights")
    add("--label-smoothing", type=fraction, default=0.1, metavar="E", help="inside the mixed targets")
    add("--mixup-alpha", type=from_zero, default=0.2, metavar="A", help="Beta(A, A) of MixUp; 0: off")
    add("--cutmix-alpha", type=from_zero, default=1.0, metavar="A", help="Beta(A, A) of CutMix; 0: off")
    add("--ema", action=Switch, default=True, help="keep and score an average of the weights")
    add("--ema-decay", type=fraction, default=0.9999, metavar="D", help="per step")
    add("--ema-ramp", action=Switch, default=True, help="let the decay grow as (1 + n) / (10 + n)")
    add(
        "--ema-half-life",
        type=number(float, 0, 10**6, open_low=True),
        default=None,
        metavar="EPOCHS",
        help="sets --ema-decay from the plan",
    )


def add_device_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision; auto: if it is fast",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of everything random")
    add("--compile", action="store_true", help="torch.compile the training forward")
    add("--deterministic", action="store_true", help="only kernels that give the same bits again")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks")


def add_asking_args(parser: argparse.ArgumentParser) -> None:
    """For commands that only ask a trained model."""
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--amp",
        default="auto",
        choices=("auto", "bf16", "fp16", "off"),
        help="mixed precision; auto: if it is fast",
    )
    add("--batch-size", type=positive, default=64, metavar="N", help="images at a time")
    add("--num-workers", type=number(int, 0, 1024), default=8, metavar="N", help="loader processes")
    add("--debug", action="store_true", help="tracebacks for errors")


def add_run_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--save-dir", default="./checkpoints", metavar="DIR", help="where this run lives")
    add(
        "--resume",
        default="",
        metavar="PATH|auto",
        help="go on from a checkpoint; auto: the newest sound one",
    )
    add(
        "--allow-change",
        type=listing(str),
        default=(),
        metavar="FLAG,...",
        help="what may differ on --resume",
    )
    add("--overwrite", action="store_true", help="delete the run that --save-dir holds")
    add(
        "--save-every",
        type=save_interval,
        default=(1, "ep"),
        metavar="N|Nmin|Ns",
        help="epochs, minutes or seconds between saves",
    )
    add(
        "--stop-after",
        type=positive,
        default=None,
        metavar="STEP",
        help="stop there, saved, as a stop signal would",
    )
    add("--eval-every", type=positive, default=1, metavar="N", help="epochs between validations")
    add(
        "--early-stop-patience",
        type=positive,
        default=None,
        metavar="N",
        help="validations at the last size without a better score before stopping",
    )
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
    file: Any = None  # the config that --config makes alone


def parse(parser: Parser, argv: list[str] | None) -> tuple[Any, Given]:
    """The frozen config, and the names of the flags that were given."""
    # Not parse_args([]): a script's positional arguments have no default.
    defaults = {a.dest: a.default for a in parser._actions if a.default is not argparse.SUPPRESS}
    by_hand = _typed(parser, argv)
    recipe = read_recipe(parser, by_hand["config"]) if by_hand.get("config") else {}
    given = Given(recipe | by_hand)
    given.by_hand = frozenset(by_hand)
    given.file = make_config(train_defaults() | defaults | recipe) if recipe else None
    return make_config(defaults | recipe | by_hand), given


def make_config(values: dict[str, Any]) -> Any:
    """A frozen dataclass of `values`: every flag is an attribute, and nothing changes one later."""
    cls = dataclasses.make_dataclass("TrainConfig", list(values), frozen=True)
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def train_parser() -> Parser:
    return build_parser("train.py", "", groups=TRAIN_GROUPS)


def train_defaults() -> dict[str, Any]:
    return vars(train_parser().parse_args([]))


def _typed(parser: Parser, argv: list[str] | None) -> dict[str, Any]:
    saved = {action: action.default for action in parser._actions}
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        # Intermixed: flags may stand between the images that predict.py is given.
        values = vars(parser.parse_intermixed_args(argv))
    finally:
        for action, default in saved.items():
            action.default = default
    for action in parser._actions:
        value = values.get(action.dest) if action.option_strings else None
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
                raise UsageError(
                    f"{dashed(action.dest)} {text!r} has a NUL or bytes that are not UTF-8",
                    "give a plain name; rename the file or folder if it is one",
                )
    return values


# --- flags from files ------------------------------------------------------------------------------

MOST_BYTES = 2**16  # of a --config file
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_recipe(parser: Parser, path: str) -> dict[str, Any]:
    """The flags of a YAML file, parsed as if they had been typed. Raises UsageError."""
    texts = read_yaml(path)
    known, of_train = {a.dest for a in parser._actions}, {a.dest for a in train_parser()._actions}
    if unknown := [name for name in texts if name not in (known | of_train) - {"config", "help"}]:
        raise UsageError(
            f"--config {path}: unknown key {unknown[0].replace('_', '-')[:80]!r}",
            "the keys are train.py's flags without the dashes",
        )
    # A recipe serves lr_finder.py too, which has no --plot.
    of_both = {name: value for name, value in texts.items() if name in known}
    try:
        values = from_file(parser, of_both)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error.what}", "write the value as you would type it") from None
    one_way = {
        a.dest for a in parser._actions if isinstance(a, argparse._StoreTrueAction)
    }  # `plot: false` gives nothing
    return {name: value for name, value in values.items() if value or name not in one_way}


def read_yaml(path: str) -> dict[str, str | list[str]]:
    """{flag: its text as written, or a list of texts}: `off`, `3e-4` and `1_000` stay what they are.

    The file is composed, not loaded: no object is ever made from it.
    """
    import yaml

    fix = "write one `flag: value` a line"
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}", fix) from None
    except RecursionError:
        raise UsageError(f"--config {path} is not YAML for people: it nests too deep", fix) from None
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise UsageError(f"--config {path} holds no flags", fix)
    found: dict[str, str | list[str]] = {}
    for key, value in node.value:
        name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else "?"
        line = f"--config {path}, line {key.start_mark.line + 1}: {name[:80]!r}"
        if name in found:
            raise UsageError(f"{line} is there twice", "keep one of the two lines")
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in (key, *items):
            if not isinstance(item, yaml.ScalarNode):
                raise UsageError(f"{line} is neither a value nor a list of values", fix)
            if item.tag.removeprefix("tag:yaml.org,2002:") not in (
                "str",
                "int",
                "float",
                "bool",
                "timestamp",
            ):
                what = "nothing" if item.tag.endswith(":null") else f"a {item.tag}"
                raise UsageError(f"{line} holds {what}", "give a value, or leave the line out")
        found[name] = [item.value for item in items] if isinstance(value, yaml.SequenceNode) else value.value
    return found


def _read_text(path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"--config {path} is not a file", f"recipes/ holds {_recipes()}")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UsageError(f"--config {path} is larger than {MOST_BYTES:,} bytes", "name a file of flags")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}", f"recipes/ holds {_recipes()}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--config {path} is not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8"
        ) from None


def from_file(parser: Parser, content: Mapping[str, Any], *, exact: bool = False) -> dict[str, Any]:
    """{flag: value} as the parser makes it of what a file holds; `exact`: of values, which must be its own.

    Raises UsageError naming the flag: unknown, of another type, out of range.
    """
    actions = {
        action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"
    }
    if unknown := sorted(str(name)[:80] for name in content if name not in actions):
        raise UsageError(f"unknown: {', '.join(unknown)}", "the keys are train.py's flags without the dashes")
    return {name: _from_file(parser, actions[name], value, exact) for name, value in content.items()}


def _from_file(parser: Parser, action: argparse.Action, value: Any, exact: bool) -> Any:
    name = action.dest
    if exact and value is None and action.default is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    if not all(type(item) in (str, int, float, bool) for item in items):
        raise UsageError(f"{name} is of a wrong type", "give a plain value")
    texts = ["on" if item is True else "off" if item is False else str(item) for item in items]
    joint = getattr(action.type, "joint", None)
    if joint is None and items is value:
        raise UsageError(f"{name} is a list and takes one value", "give one value")
    if action.nargs == 0:
        parsed = SWITCH_WORDS.get(texts[0].lower())
    elif action.default == "" and SWITCH_WORDS.get(texts[0].lower()) is False:  # `wandb: no` names no project
        parsed = ""
    else:
        parsed = _typed(parser, [f"{dashed(name)}={(joint or '').join(texts)}"])[name]
    written = list(value) if isinstance(value, tuple) else value
    if parsed is None or (exact and (list(parsed) if isinstance(parsed, tuple) else parsed) != written):
        shown = ",".join(texts)[:80]
        raise UsageError(
            f"{name} is {shown!r}, which is not what {dashed(name)} takes", "give it as --help says"
        )
    return parsed


def _recipes() -> str:
    return (
        ", ".join(sorted(p.name for p in (Path(__file__).parent.parent / "recipes").glob("*.yaml")))
        or "no recipe"
    )


def check_train(config: Any, typed: Given) -> list[str]:
    """Refuse what cannot work together (exit 2); return the notes worth printing."""
    if ranks := process.incomplete_ranks():
        raise UsageError(
            f"the environment has {ranks}, which is no whole set of ranks",
            "start with torchrun, or unset these variables",
        )
    phases = len(config.resize_schedule)
    if not phases:
        raise UsageError(
            "--resize-schedule is empty", "give at least one size, such as --resize-schedule 224"
        )
    for name in ("phase_epochs", "phase_batch_sizes", "phase_mix"):
        value = getattr(config, name)
        if value is not None and len(value) != phases:
            raise UsageError(
                f"{dashed(name)} has {len(value)} entries but there are {phases} phases",
                "give one entry for each size of --resize-schedule",
            )
    notes = refuse_idle(TABLE, config, typed)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "leave one of the two out")
    if config.schedule == "cosine" and config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of {config.epochs} epochs for the cosine",
            "give a smaller --warmup-epochs, or 0",
        )
    if config.nesterov and config.momentum == 0:
        raise UsageError("--nesterov needs a momentum", "give --momentum 0.9")
    smallest = min(config.resize_schedule)
    most = {"padcrop": smallest - 1, "cutout": 2 * smallest - 1}
    for name, size in parse_augment(config.augment):
        if name in most and size > most[name]:
            raise UsageError(
                f"--augment {name}:{size} leaves nothing of an image of {smallest} px",
                f"give at most {name}:{most[name]}, or larger --resize-schedule sizes",
            )
    return notes


# --- what each flag changes, and when it cannot ----------------------------------------------------

# A flag that is given shows in what its row names, or in an earlier one of these, or it is refused:
# plan    the data and the steps                 trace      what a step computes
# model   the layers that --summary prints       processes  where and by whom it is computed
# output  what is printed                        files      what --save-dir holds, and when
# resume  which run is gone on with
Reason = str | bool | None  # a false one: none


@dataclass(frozen=True)
class Row:
    """A flag of train.py: what it changes, and why it cannot under a config, in words."""

    name: str
    changes: str
    idle: Callable[[Any], Reason] = lambda config: None
    note: bool = False  # said, not refused


def _one_phase(config: Any) -> Reason:
    return len(config.resize_schedule) == 1 and "there is one phase"


def _no_average(config: Any) -> Reason:
    return not config.ema and "EMA is off"


def _ema_decay(config: Any) -> Reason:
    return _no_average(config) or (config.ema_half_life is not None and "--ema-half-life sets the decay")


def _all_off(config: Any) -> Reason:
    return not any(mix for _, mix in used_phases(config)) and "--phase-mix is off in every phase"


def _alone(config: Any) -> Reason:
    return max(batch for batch, _ in used_phases(config)) == 1 and "every batch is one image"


def _nothing_mixed(config: Any) -> Reason:
    return _all_off(config) or _alone(config)


def _phase_mix(config: Any) -> Reason:
    drops = config.drop_path_rate and config.arch not in NO_DROP_PATH
    return (
        not (config.mixup_alpha or config.cutmix_alpha or drops) and "there is no MixUp, CutMix or drop-path"
    )


def _own_parts(config: Any) -> Reason:
    return "resnet" not in config.arch and f"{config.arch} is torchvision's, as it is"


def _sync_bn(config: Any) -> Reason:
    if config.arch in NO_BATCH_NORM:
        return f"{config.arch} has no BatchNorm"
    return process.world_size() == 1 and "there is one process (torchrun starts several)"


def _split(config: Any) -> Reason:
    return _packed(config) or (config.dataset != "tiny-imagenet" and "it needs --dataset tiny-imagenet")


def _class_list(config: Any) -> Reason:
    named = config.dataset in ("imagenet", "imagenet100")
    return _packed(config) or (not named and "it needs --dataset imagenet or imagenet100")


def _class_mismatch(config: Any) -> Reason:
    known = _kind(config) in ("cifar10", "cifar100", *NO_FILES)
    return _packed(config) or (known and f"{config.dataset} has its classes in train and val")


def _bad_image(config: Any) -> Reason:
    arrays = _kind(config) in ("digits", "synthetic") or (
        _kind(config).startswith("cifar") and not _packed(config)
    )
    return arrays and f"{config.dataset} has no image files"


def _packed(config: Any) -> Reason:
    found = _kind(config) not in NO_FILES and os.path.isfile(os.path.join(config.data_dir, "manifest.json"))
    return found and f"{config.data_dir} is a packed copy, which has what it was packed with"


def _kind(config: Any) -> str:
    return config.dataset.partition(":")[0]


def _other_weights(config: Any) -> Reason:
    return config.resume not in ("", "auto") and "--resume brings the weights"


def _only_looked(config: Any) -> Reason:
    return next(
        (f"{dashed(name)} writes nothing" for name in ("summary", "dry_run") if getattr(config, name, False)),
        None,
    )


NO_FILES = ("digits", "synthetic", "hf")
NO_DROP_PATH = ("mobilenet_v3_large", "vit_b_16")  # no StochasticDepth inside
NO_BATCH_NORM = ("vit_b_16", "swin_t")
TABLE = (
    Row("data_dir", "plan", lambda c: _kind(c) in NO_FILES and f"{c.dataset} needs no directory", note=True),
    Row("dataset", "plan"),
    Row("split", "plan", _split),
    Row("class_list", "plan", _class_list),
    Row("allow_class_mismatch", "plan", _class_mismatch),
    Row("subset", "plan"),
    Row("subset_size", "plan", lambda c: not c.subset and "it needs --subset"),
    Row("augment", "trace"),
    Row("on_bad_image", "trace", _bad_image),
    Row("num_workers", "processes"),
    Row("arch", "model"),
    Row("drop_path_rate", "trace", lambda c: c.arch in NO_DROP_PATH and f"{c.arch} has no branches to drop", note=True),
    Row("drop_path_rate", "trace", lambda c: c.arch not in NO_DROP_PATH and _all_off(c)),
    Row("use_blurpool", "model", _own_parts),
    Row("head", "model", _own_parts),
    Row("stem", "model", _own_parts),
    Row("init_from", "trace", _other_weights),
    Row("reset_head", "trace", lambda c: (not c.init_from and "it needs --init-from") or _other_weights(c)),
    Row("epochs", "plan"),
    Row("batch_size", "plan", lambda c: c.phase_batch_sizes and "--phase-batch-sizes has every batch"),
    Row("resize_schedule", "plan"),
    Row("phase_epochs", "plan", lambda c: _one_phase(c) or (c.epochs == 1 and "the one epoch is the last phase's")),
    Row("phase_batch_sizes", "plan"),
    Row("phase_mix", "trace", _phase_mix),
    Row("accumulate", "trace", _alone),
    Row("optimizer", "trace"),
    Row("lr", "trace"),
    Row("momentum", "trace", lambda c: c.optimizer not in ("sgd", "rmsprop") and f"{c.optimizer} has none", note=True),
    Row("nesterov", "trace", lambda c: c.optimizer != "sgd" and "it needs --optimizer sgd"),
    Row("weight_decay", "trace"),
    Row("schedule", "trace"),
    Row("warmup_epochs", "trace", lambda c: c.schedule != "cosine" and "it needs --schedule cosine"),
    Row("cycles", "trace", lambda c: c.schedule not in ("restarts", "triangular2")
        and "it needs --schedule restarts or triangular2"),
    Row("lr_scale", "trace", lambda c: len({batch for batch, _ in used_phases(c)}) < 2 and "every phase has the same batch"),
    Row("clip_norm", "trace"),
    Row("clip_mode", "trace", lambda c: not c.clip_norm and "--clip-norm 0 clips nothing"),
    Row("loss", "trace"),
    Row("l1", "trace"),
    Row("label_smoothing", "trace"),
    Row("mixup_alpha", "trace", _nothing_mixed),
    Row("cutmix_alpha", "trace", _nothing_mixed),
    Row("ema", "trace"),
    Row("ema_decay", "trace", _ema_decay),
    Row("ema_ramp", "trace", _ema_decay),
    Row("ema_half_life", "trace", _no_average),
    Row("device", "processes"),
    Row("amp", "trace"),
    Row("seed", "trace"),
    Row("compile", "processes"),
    Row("deterministic", "processes"),
    Row("sync_bn", "processes", _sync_bn),
    Row("save_dir", "output", lambda c: c.summary and c.resume != "auto" and "--summary writes nothing"),
    Row("resume", "resume"),
    Row("allow_change", "resume", lambda c: not c.resume and "it needs --resume"),
    Row("overwrite", "files"),
    Row("save_every", "files", lambda c: c.epochs == 1 and c.save_every[1] == "ep" and "the only epoch is saved anyway"),
    Row("stop_after", "files"),
    Row("eval_every", "trace", lambda c: c.epochs == 1 and "the only epoch is validated anyway"),
    Row("early_stop_patience", "files", lambda c: used_epochs(c)[-1] == 1 and "the last size has one epoch"),
    Row("plot", "files"),
    Row("tensorboard", "files"),
    Row("wandb", "files"),
    Row("summary", "output"),
    Row("dry_run", "output", lambda c: c.summary and "--summary only prints the layers"),
    Row("config", "output"),
    Row("debug", "output"),
)  # fmt: skip


def why_idle(row: Row, config: Any) -> Reason:
    """Why `row`'s flag cannot change what `config` does; false where it can."""
    if getattr(config, "summary", False) and row.changes in ("trace", "processes"):
        return "--summary takes no step"
    return (row.changes == "files" and _only_looked(config)) or row.idle(config)


def refuse_idle(table: Sequence[Row], config: Any, given: Given) -> list[str]:
    """Notes on flags that are given and idle. Raises UsageError for those that are to be refused.

    A file answers for what is idle by the file alone; what it brings may be idled by hand.
    """
    by_hand, by_file, notes = {}, {}, []
    for row in table:
        reason = row.name in given and why_idle(row, config)
        if reason and row.note:
            notes.append(f"note: {dashed(row.name)} is not used: {reason}")
        elif reason and row.name in given.by_hand:
            by_hand[dashed(row.name)] = reason
        elif reason and why_idle(row, given.file):
            by_file[row.name.replace("_", "-")] = reason
    for found, where in ((by_hand, ""), (by_file, f"--config {getattr(config, 'config', '')}: ")):
        if found:
            what = "; ".join(f"{name} would do nothing: {reason}" for name, reason in found.items())
            raise UsageError(where + what, f"leave {', '.join(found)} out")
    return notes


def used_epochs(config: Any) -> list[int]:
    return share_epochs(config.epochs, config.phase_epochs, len(config.resize_schedule))


def used_phases(config: Any) -> list[tuple[int, bool]]:
    """(global batch, whether it is mixed) of every phase that gets an epoch."""
    phases = range(len(config.resize_schedule))
    batches = config.phase_batch_sizes or phase_batches(config.batch_size, len(phases))
    mixes = config.phase_mix or (True for _ in phases)
    return [(batch, mix) for batch, mix, n in zip(batches, mixes, used_epochs(config), strict=False) if n]


def phase_batches(first: int, phases: int) -> list[int]:
    """--batch-size, halved at each size."""
    return [max(1, first >> k) for k in range(phases)]


def share_epochs(epochs: int, weights: Sequence[int] | None, parts: int) -> list[int]:
    """Split `epochs` by `weights` (largest remainder); the last part always gets one.

    Without weights three phases share 30 : 20 : 40, as in the documents, any other number evenly.
    """
    weights = weights or ((30, 20, 40) if parts == 3 else (1,) * parts)
    exact = [epochs * weight / sum(weights) for weight in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (exact[k] - shares[k], k), reverse=True)
    for k in by_remainder[: epochs - sum(shares)]:
        shares[k] += 1
    if shares[-1] == 0:
        shares[max(range(len(weights)), key=lambda k: shares[k])] -= 1
        shares[-1] = 1
    return shares


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def plain(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values, home folder and all other surroundings left out."""
    values = dataclasses.asdict(config)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def workers_note(asked: int) -> str:
    """What is to be said where more loader processes are asked for than there are cores."""
    return (
        f"{asked} loader workers asked for, {process.cores()} cores: using {process.cores()}"
        if asked > process.cores()
        else ""
    )


def data_args(config: Any) -> dict[str, Any]:
    """The data flags as `sources.layouts.open_dataset` takes them."""
    return {
        "dataset": config.dataset,
        "data_dir": config.data_dir,
        "split": config.split,
        "class_list": config.class_list or None,
        "allow_class_mismatch": config.allow_class_mismatch,
        "subset_size": config.subset_size if config.subset else None,
    }
