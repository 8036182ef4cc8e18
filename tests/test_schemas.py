"""Files that are not what they should be: every field of each, deleted or made wrong, is refused by name."""

import copy
import json
import shutil
import sys
import time

import pytest
import torch
from inprocess import TINY, config_of, tiny_run
from test_packed import make_folders

import checkpoint
import errors
import pack_dataset
import train
from analysis import runs
from analysis import subject as subjects
from errors import CheckpointError, DataError
from sources.packed import open_packed

FOREIGN = [None, "5", True, 1.5, -5, 10**30, float("nan"), [], {}, [[[]]], "\x1b[31m\nred"]
SAME = {bool: bool, int: int, float: float, str: str}


def places(value, at=()):
    """The path of everything in `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*at, key)
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for key, item in enumerate(value[:2]):
            yield (*at, key)
            yield from places(item, (*at, key))


def changed(content, at, *new):
    """A copy with another value at a place, or without that place; tensors are not copied."""
    content = type(content)(content)
    key, *rest = at
    if rest:
        content[key] = changed(content[key], rest, *new)
    elif new:
        content[key] = new[0]
    else:
        del content[key]
    return content


def foreign(value):
    """What may not stand where `value` stands: whatever is of another type, and numbers that no field can have."""
    for new in FOREIGN:
        number = type(value) in (int, float) and type(new) in (int, float)
        if number and (new == new and abs(new) < 10 and (type(value) is float or type(new) is int)) and new >= 0:
            continue  # another number
        if type(new) is type(value) and not number and new != []:
            continue  # another text or bool
        yield new
    if isinstance(value, torch.Tensor):
        yield from (value.to(torch.int8), value.double(), value[None], value.flatten().repeat(3), value.to_sparse())
        yield torch.zeros(2, 2).expand(2, 2)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run in its third epoch."""
    save_dir = tmp_path_factory.mktemp("stopped")
    assert train.main([*TINY, "--save-dir", str(save_dir), "--stop-after", "12"]) == 0
    return next(save_dir.glob("last_*.pt"))


@pytest.fixture(scope="module")
def payload(stopped):
    return torch.load(stopped, weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that could go on from it."""
    return tiny_run(tmp_path_factory.mktemp("run")), config_of()


# What may be missing or take any plain value: flags, which are judged as flags, and the optimizer's options, which nothing takes.
FREE = {"commit", "head", "stem", "arch", "dataset", "precision", "better"}
OPTIONAL = {"commit", "head", "stem", "top", "drop_path_rate", "use_blurpool", "image_sizes"}


def skipped(at: tuple) -> bool:
    return at[0] == "config" and len(at) > 1 or "param_groups" in at and at[-1] != "params" and "params" not in at


def mutations(payload):
    for at in places(payload):
        value = payload
        for key in at:
            value = value[key]
        some = at[-1] if isinstance(at[-1], str) else at
        if at[:1] == ("model",) and len(at) == 2 and at[1] not in list(payload["model"])[:3]:
            continue  # three tensors of each kind tell as much as all
        if at[:2] == ("ema", "shadow") and len(at) == 3 and at[2] not in list(payload["model"])[:3]:
            continue
        if at[:2] == ("optimizer", "state") and len(at) > 2 and at[2] not in (0, 37) or skipped(at):
            continue
        nullable = at[0] == "rows" and at[-1] not in ("epoch", 0, 1)
        if not (some in OPTIONAL or nullable or (at[0] == "rows" and len(at) == 2)):
            yield (*at, "deleted"), at, ()
        for new in foreign(value):
            if nullable and (new is None or (new != new and "loss" in at[-1])):
                continue
            if at in {("eval", "mean"), ("eval", "std")} or not (new == [] and at in {("rows",)}):
                yield (*at, repr(new)[:30]), at, (new,)


def test_every_field_of_a_checkpoint_deleted_or_made_wrong_is_refused(payload, run, tmp_path):
    built, config = run
    path, accepted, count = tmp_path / "last_x.pt", [], 0
    for name, at, new in mutations(payload):
        torch.save(changed(payload, at, *new), path)
        count += 1
        try:
            train.restore(built, checkpoint.load(path), config)
        except CheckpointError as error:
            assert error.exit_code == 4 and error.what.replace(str(tmp_path), "").isprintable(), (name, error.what)
            continue
        accepted.append(name)
    assert not accepted and count > 500
    train.restore(built, checkpoint.load(stopped_again(payload, path)), config)


def stopped_again(payload, path):
    torch.save(payload, path)
    return path
