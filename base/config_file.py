"""Flags from YAML files and checkpoints, parsed like the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from base.errors import UsageError, did_you_mean
from base.parser import Parser, dashed, typed_text
from base.process import ROOT

RECIPES = ROOT / "recipes"
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
ONE_PER_LINE = "write one `flag: value` per line"
KEYS = "the keys are the flags of train.py without the dashes"


def read_recipe(parser: Parser, path: str, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the flags of a YAML file, parsed as if they had been typed. Raises UsageError.

    ignored: known flags that `parser` may lack: lr_finder.py accepts recipes but has no --plot
    """
    known, path = parser.flags.keys(), find_recipe(path)
    texts = read_yaml(path)
    if unknown := [name for name in texts if name not in (known | set(ignored)) - {"config"}]:
        key, keys = unknown[0].replace("_", "-")[:80], (name.replace("_", "-") for name in known)
        raise UsageError(f"--config {path}: unknown key {key!r}", did_you_mean(key, keys) + KEYS)
    try:
        return from_file(parser, {name: value for name, value in texts.items() if name in known})
    except UsageError as error:
        raise UsageError(f"--config {path}: {error.what}", "write the value as you would type it") from None


def find_recipe(name: str) -> str:
    """Return the path of a --config file: "digits" is recipes/digits.yaml, unless there is such a file."""
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    is_bare = name == os.path.basename(name) and not os.path.isfile(name)
    return os.path.relpath(recipe) if is_bare and recipe.is_file() else name


def read_yaml(path: str) -> dict[str, Any]:
    """Return {flag: text or list of texts}, as they are written: YAML itself would turn `off` into False.

    No Python object is ever made from the file. Raises UsageError.
    """
    import yaml

    try:
        loader = yaml.BaseLoader(Path(path).read_text("utf-8-sig"))
        node = loader.get_single_node()
        found = loader.construct_document(node) if node else None
    except OSError as error:
        recipes = sorted(p.name for p in RECIPES.glob("*.yaml"))
        fix = did_you_mean(os.path.basename(path), recipes) + f"recipes/ holds {', '.join(recipes)}"
        raise UsageError(f"--config {path}: {error.strerror}", fix) from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        what = f"--config {path} is not YAML: {' '.join(str(error).split())[:200]}"
        raise UsageError(what, ONE_PER_LINE) from None
    if not isinstance(found, dict) or not found:
        raise UsageError(f"--config {path} holds no flags", ONE_PER_LINE)
    flags = {name.replace("-", "_"): value for name, value in found.items()}
    if len(flags) < len(node.value):
        raise UsageError(f"--config {path}: a flag appears twice", ONE_PER_LINE)
    if empty := [name for name, value in flags.items() if value in ("", "null", "~")]:
        raise UsageError(f"--config {path}: {empty[0][:80]} has no value", ONE_PER_LINE)
    return flags


def from_file(parser: Parser, content: Mapping[str, Any], *, exact: bool = False) -> dict[str, Any]:
    """Return {flag: value} for the content of a file, parsed and checked by `parser`.

    exact: the file holds parsed values (a checkpoint does), which must come out unchanged
    Raises UsageError that names the flag if it is unknown, has the wrong type, or is out of range.
    """
    actions = parser.flags
    if unknown := sorted(str(name)[:80] for name in content if name not in actions):
        raise UsageError(f"unknown: {', '.join(unknown)}", KEYS)
    return {name: _parsed(parser, actions[name], value, exact) for name, value in content.items()}


def _parsed(parser: Parser, action: argparse.Action, value: Any, exact: bool) -> Any:
    name, several = action.dest, isinstance(value, list | tuple)
    if exact and value is None and action.default is None:
        return None
    items = list(value) if several else [value]
    if not all(type(item) in (str, int, float, bool) for item in items):
        raise UsageError(f"{name} has the wrong type", "use a plain value")
    separator = getattr(action.type, "separator", None)
    if several and separator is None:
        raise UsageError(f"{name} is a list, but takes one value", "give one value")
    text = typed_text(items, separator or "")
    switch = SWITCH_WORDS.get(text.lower())
    if action.nargs == 0:
        parsed = switch
    elif switch is False and action.default == "" and not exact:  # `wandb: no` names no project
        parsed = ""
    else:
        parsed = parser.given([f"{dashed(name)}={text}"])[name]
    as_stored = list(parsed) if isinstance(parsed, tuple) else parsed
    if parsed is None or (exact and as_stored != (items if several else value)):
        raise UsageError(
            f"{name} is {text[:80]!r}, which {dashed(name)} does not take", "use a value that --help names"
        )
    return parsed
