"""A stricter argparse, and the argument types that flags are made of."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from base import errors, process
from base.errors import UsageError, closest, did_you_mean

AUGMENT_SETS = {"full": "rrc,flip,affine,jitter,dropout", "basic": "rrc,flip", "none": ""}
AUGMENTS = {  # name -> its argument
    "rrc": "", "padcrop": ":N", "flip": "", "affine": "", "jitter": "[:N]", "dropout": "", "cutout": ":N",
    "randaugment": "[:M[:STD]]", "trivialaugment": "",
}  # fmt: skip
PIPELINES = (".yaml", ".yml", ".json")  # an augmentation that ends like this is a file of Albumentations
MISSING = object()  # the value of a flag that was not given
OTHER_NAMES = {  # what other trainers call a flag of ours
    "--model": "--arch", "--learning-rate": "--lr", "--opt": "--optimizer", "--wd": "--weight-decay",
    "--workers": "--num-workers", "--batch": "--batch-size", "--imgsz": "--resize-schedule",
    "--img-size": "--resize-schedule", "--image-size": "--resize-schedule", "--data": "--data-dir",
    "--data-path": "--data-dir", "--output": "--save-dir", "--output-dir": "--save-dir",
    "--out": "--save-dir", "--sched": "--schedule", "--lr-scheduler": "--schedule", "--smoothing":
    "--label-smoothing", "--mixup": "--mixup-alpha", "--cutmix": "--cutmix-alpha", "--drop-path":
    "--drop-path-rate", "--model-ema": "--ema", "--patience": "--early-stop-patience",
}  # fmt: skip
ELSEWHERE = {  # flags that one may look for in the wrong command
    "validate.py": ("--image-sizes", "--crop", "--tta", "--average", "--recalibrate-bn", "--save-hits"),
    "predict.py": ("--top", "--export", "--csv"),
    "lr_finder.py": ("--num-iter", "--start-lr", "--end-lr", "--trials", "--trial-epochs"),
    "pack_dataset.py": ("--stored-sides", "--raw-sides", "--quality", "--eval-sizes", "--verify"),
}


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(action: argparse.Action) -> list[str]:
    """Return the option strings to show: of a switch that is off by default only --x, without --no-x."""
    return action.option_strings[: 1 if isinstance(action, Switch) and not action.default else None]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help texts with range, choices and default; the usage line shows only positional arguments."""

    def add_usage(self, usage, actions, groups, prefix=None):
        self._prog = f"python {self._prog.removeprefix('python ')} [flags]"
        super().add_usage(usage, [action for action in actions if not action.option_strings], [], prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            return ", ".join(shown(action))
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # BooleanOptionalAction adds it
        notes = [getattr(action.type, "range", "")]
        if action.choices and action.metavar:
            notes = ["one of " + ", ".join(filter(None, action.choices))]
        default = typed_text(action.default, getattr(action.type, "separator", ","))
        if default not in ("", argparse.SUPPRESS) and "default" not in text.lower():
            notes.append(f"default: {default}")
        shown = "; ".join(filter(None, notes)).replace("%", "%%")
        return f"{text} ({shown})" if shown else text


class _Version(argparse.Action):
    """Prints the versions of this code and of torch, then exits."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, *args):
        print(process.versions())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates a flag, and raises `UsageError` where argparse would exit."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.elsewhere: dict[str, set[str]] = {}  # more of `ELSEWHERE`
        self.add_argument("--version", action=_Version, help="Show the versions of this code and of torch.")

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The flags that have a value, by name: all but --help and --version."""
        valued = [a for a in self._actions if a.option_strings and a.default is not argparse.SUPPRESS]
        return {action.dest: action for action in valued}

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        self._refuse(unknown)
        return found

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        errors.debug = errors.debug or "--debug" in words
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # argparse would take it for an empty list
                self.error(f"{word}: -- is not a value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str, hint: str = ""):
        raise UsageError(message, hint or f"run python {self.prog.removeprefix('python ')} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices if choice]
            message = f"{value!r} is not one of {', '.join(known)}"
            self.error(str(argparse.ArgumentError(action, message)), did_you_mean(str(value), known))

    def _refuse(self, unknown: list[str]) -> None:
        """Raise UsageError for arguments that this command does not take, with what was meant."""
        if not unknown:
            return
        word, known = unknown[0].partition("=")[0], self._option_string_actions.keys()
        others = {name for name, ours in OTHER_NAMES.items() if ours in known}
        near = closest(word, {name for action in self._actions for name in shown(action)} | others)
        hint = f"did you mean {OTHER_NAMES.get(near, near)}?" if near else ""
        if "--data-dir" in known and os.path.isdir(word):
            hint = f"did you mean --data-dir {word}?"
        for command, theirs in (ELSEWHERE | self.elsewhere).items():
            if word in theirs:
                hint = f"{word} is a flag of {command}"
        self.error(f"unrecognized arguments: {' '.join(unknown)}", hint)

    def given(self, argv: list[str] | None) -> dict[str, Any]:
        """Return {name: value} of the arguments in `argv`, without those left at their defaults."""
        empty = argparse.Namespace(**{action.dest: MISSING for action in self._actions})
        # Intermixed, because flags may stand between the image files of predict.py.
        found, unknown = self.parse_known_intermixed_args(argv, empty)
        self._refuse(unknown)
        values = {name: value for name, value in vars(found).items() if value is not MISSING}
        for name in self.flags:
            _check_text(name, values.get(name))
        return values

    def defaults(self) -> dict[str, Any]:
        return {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}


def _check_text(name: str, value: Any) -> None:
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
            raise UsageError(
                f"{dashed(name)} {text!r} contains a NUL or bytes that are not UTF-8",
                "use another name; rename the file or folder if it has this name",
            )


def typed_text(value: Any, separator: str = ",") -> str:
    """Return `value` as it would be typed; '' for a switch that is off and for no value."""
    if isinstance(value, tuple | list):
        return separator.join("on" if v is True else "off" if v is False else str(v) for v in value)
    return "on" if value is True else "" if value is None or value is False else str(value)


# --- types ------------------------------------------------------------------------------------------
# A type may have a `range`, shown in the help, and a `separator` between the parts of its value as text.


def number(
    kind: type, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type for a finite number in [low, high]; an open end excludes the bound itself."""
    lower = f"above {low:,}" if open_low else f"at least {low:,}"
    if high == math.inf:
        allowed = lower
    elif open_low or open_high:
        allowed = f"{lower} and {'below' if open_high else 'at most'} {high:,}"
    else:
        allowed = f"from {low:,} to {high:,}"
    problem = f"must be a {'whole number' if kind is int else 'number'}, {allowed}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{problem}; got {text[:80]!r}") from None
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (above and below) or value == math.inf:  # NaN fails every comparison
            raise argparse.ArgumentTypeError(f"{problem}; got {text[:80]}")
        return value

    parse.range = lower if high == LARGEST else allowed
    return parse


LEAST_ALPHA = 0.01  # below it, the two gamma variates behind torch's Beta underflow to a ratio of 1/2


def mixing_alpha(text: str) -> float:
    """Parse an alpha of MixUp or CutMix."""
    value = number(float, 0)(text)
    if 0 < value < LEAST_ALPHA:
        raise argparse.ArgumentTypeError(f"must be a number, {mixing_alpha.range}; got {text}")
    return value


mixing_alpha.range = f"0 or at least {LEAST_ALPHA}"


def count_or_share(text: str) -> int | float:
    """Parse "5000", a count, or "0.1", a share below 1."""
    kind = int if text.isdecimal() else float
    return number(kind, 0, 1 if kind is float else LARGEST, open_high=kind is float)(text)


count_or_share.range = "a number of images, or a share below 1 such as 0.1"


def listing(item: Callable[[str], Any], separator: str = ",") -> Callable[[str], tuple]:
    """Return an argparse type: items of type `item` between separators, as a tuple."""

    def parse(text: str) -> tuple:
        return tuple(item(part.strip()) for part in str(text).split(separator) if part.strip())

    parse.separator, parse.range = separator, getattr(item, "range", "")
    return parse


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


LARGEST = 10**9  # so that counts of steps stay exact in floats and files
positive, above_zero = number(int, 1, LARGEST), number(float, 0, open_low=True)
Switch = argparse.BooleanOptionalAction


def save_interval(text: str) -> tuple[float, str]:
    """Parse '2' or '2ep' into (2, 'ep'), and '15min' or '30s' into (minutes, 'min'). See --save-every."""
    for unit, minutes in (("min", 1), ("s", 1 / 60)):
        if text.endswith(unit):
            return above_zero(text.removesuffix(unit)) * minutes, "min"
    epochs = text.removesuffix("ep")
    if not epochs.lstrip("+-").replace("_", "").isdecimal():
        what = "is neither a number of epochs nor minutes or seconds: write 2, 15min or 30s"
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {what}")
    return positive(epochs), "ep"


save_interval.separator = ""


def parse_augment(text: str) -> tuple[tuple[str, Any], ...]:
    """Parse 'full', 'basic', 'none' or steps such as 'padcrop:4,flip' into ((name, argument or None), ...).

    An argument is a whole number, of randaugment a tuple of numbers: (magnitude, standard deviation). A
    step such as 'mine.yaml' becomes ("pipeline", "mine.yaml").
    """
    steps = []
    for part in AUGMENT_SETS.get(text, text).split(","):
        name, _, argument = part.strip().partition(":")
        if not name:
            continue
        if part.strip().endswith(PIPELINES):
            steps.append(("pipeline", part.strip()))
            continue
        if name not in AUGMENTS:
            hint = did_you_mean(name, AUGMENTS)
            raise argparse.ArgumentTypeError(
                f"unknown augmentation {name!r}; {hint}use {', '.join(AUGMENTS)}"
            )
        if AUGMENTS[name] == ":N" and not argument:
            raise argparse.ArgumentTypeError(f"{name} needs a size in pixels, such as {name}:4")
        if argument and not AUGMENTS[name]:
            raise argparse.ArgumentTypeError(f"{name} takes no argument")
        steps.append((name, _augment_argument(name, argument) if argument else None))
    crops = [name for name, _ in steps if name in ("rrc", "padcrop")]
    if len(crops) > 1:
        raise argparse.ArgumentTypeError(f"{' and '.join(crops)}: use only one crop")
    return tuple(steps)


def _augment_argument(name: str, text: str) -> int | tuple[float, float]:
    if name != "randaugment":
        return number(int, 1, 100 if name == "jitter" else 4096)(text)
    magnitude, _, deviation = text.partition(":")
    return number(float, 0, 10)(magnitude), number(float, 0, 10)(deviation or "0")


def augment_text(text: str) -> str:
    """Check a list of augmentations, and return it as text, which is how files store it."""
    parse_augment(text)
    return text


augment_text.separator = ","
