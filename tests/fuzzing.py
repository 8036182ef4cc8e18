"""Random command lines and damaged files, and what must hold for all of them; test_fuzz.py runs them.

A case is a function of (kind, seed, number), or is written out. Each runs in a process forked from one that
has imported everything, and in a folder of its own, which starts as a copy of the same few files.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import ROOT
from runs import SERVER

HANG = 20  # seconds; an ordinary case takes half of one
PRELOADED = (
    "torch numpy cv2 albumentations pyarrow yaml train harness.build loop sources.layouts sources.packed "
    "analysis.predictions torch._dynamo torchvision matplotlib.figure runs fuzzing"
)
SERVER.set_forkserver_preload(PRELOADED.split())
TINY = shlex.split(
    "--dataset digits --subset --subset-size 40 --arch resnet_tiny --epochs 2 --resize-schedule 8,16 "
    "--phase-batch-sizes 10,10 --num-workers 0 --device cpu --amp off"
)
FOLDERS = [*TINY[5:], "--dataset", "imagenet", "--data-dir"]
HALF, LAST = "half/last_resnet_tiny_digits.pt", "run/last_resnet_tiny_digits.pt"
FOREIGN = ("run/thesis.pt", "run/plots/holiday.png", "run/notes.partial", "half/notes.txt")
ODD_TEXT = (
    "",
    " ",
    "x",
    "\x1b[31mred\x07",
    "a\nb",
    "\0",
    "\udcff",
    "é ☃",
    "x" * 300,
    "-",
    "--",
    "empty/../x",
    "%s{0}",
)
NUMBERS = (
    "0", "1", "2", "3", "8", "16", "-1", "0.5", "0.999", "1e-3", "1.0", "nan", "inf", "1e308", "5e-324",
    "1e400", "9" * 400, "1_0", "٣", "0x10", "+5", "-0.0", str(2**31), str(2**63), "10min", "2ep", "0.001min",
    "1e308min", "on", "off", "on,off", "8,16", "16,24,32", "10,10", "1,1", "8,8,8", ",", "1,,2", "flip",
    "none", "basic", "padcrop:4", "rrc,padcrop:100", "cutout:9999", "jitter:0", "randaugment,trivialaugment",
    "randaugment:6:0.5", "randaugment:0:10", "nowhere.yaml", "flags.yaml", "none/none", "lr", "data,seed",
)  # fmt: skip
PATHS = (
    "run", "half", "new", LAST, HALF, "data", "packed", "flags.yaml", "classes.txt", "data/val/owl/0.png",
    "empty", ".", "empty/..", "nowhere", "auto", "/dev/null", "run/metrics.jsonl", "-", *ODD_TEXT,
)  # fmt: skip
NAMES = {
    "--dataset": ("digits", "imagenet", "synthetic:classes=2,train=20,val=4,size=9", "cifar10",
                  "tiny-imagenet", "synthetic:", "synthetic:size=100000", "synthetic:classes=1",
                  "synthetic:size=9,size=x", "digits:1", *ODD_TEXT),
    "--device": ("cpu", "auto", "cuda", "cuda:9", "mps", "meta", "cpu:3", "xla", *ODD_TEXT),
}  # fmt: skip
SLOW = {"compile", "mode", "points"}  # flags that compile, train in further processes or evaluate a grid
OTHERS = {  # the first arguments of the other commands
    "validate": [HALF, "--device", "cpu", "--num-workers", "0"],
    "predict": [HALF, "data/val", "--device", "cpu", "--num-workers", "0"],
    "lr_finder": [*TINY, "--num-iter", "10", "--out", "new"],
    "pack_dataset": ["--data-dir", "data", "--out", "new", "--stored-sides", "8", "--workers", "1"],
    "analysis.plots": ["run"],
    "analysis.report": ["run", "--no-pictures", "--device", "cpu"],
    "analysis.filters": [HALF, "--device", "cpu"],
    "analysis.gradcam": [HALF, "--device", "cpu", "--count", "2"],
    "analysis.misclassified": [HALF, "--device", "cpu"],
    "analysis.batch": [*TINY, "--show-steps", "1", "--show-images", "2"],
    "analysis.loss_landscape": [HALF, "--device", "cpu", "--points", "3", "--samples", "4"],
}


@dataclass
class Case:
    name: str  # the command that reproduces it, or what the case is
    command: str
    argv: list[str]
    spoil: Callable[[Path], None] = lambda folder: None  # damages the copy of the files
    codes: tuple[int, ...] = (0, 2, 3, 4, 5, 6, 130, 143)


# --- the files that every case starts with ----------------------------------------------------------


def make_files(folder: Path) -> Path:
    """Make a finished run, one stopped half-way, class folders, a packed copy, and somebody else's files."""
    from PIL import Image

    for split, count in (("train", 5), ("val", 2)):
        for shade, name in enumerate(("cat", "owl")):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20 + i, 18), (90 * shade, 20 * i, 99))
                image.save(folder / f"data/{split}/{name}/{i}.png")
    packing = ["--data-dir", "data", "--out", "packed", "--stored-sides", "8,16", "--workers", "1"]
    steps = [
        ("train", [*TINY, "--save-dir", "run"]),
        ("train", [*TINY, "--save-dir", "half", "--stop-after", "6"]),
        ("pack_dataset", packing),
    ]
    for command, argv in steps:
        code, said = execute(command, argv, folder, folder.parent / "making")
        assert code == 0, said
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of another person")
    (folder / "flags.yaml").write_text("epochs: 1\nlr: 1e-3\nphase_epochs: [1, 1]\n")
    (folder / "classes.txt").write_text("cat\nowl\n")
    (folder / "empty").mkdir()
    return folder


def listing(folder: Path) -> dict[str, int]:
    """Return {name: checksum}; 0 for locks and for what is not a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = stat.S_ISREG(path.lstat().st_mode) and path.name != ".lock"
        found[str(path.relative_to(folder))] = zlib.crc32(path.read_bytes()) if plain else 0
    return found


# --- one case, in a process of its own ---------------------------------------------------------------


def _child(command: str, argv: list[str], folder: str, log: str) -> None:
    os.setsid()  # so that it can be killed together with its workers
    os.chdir(folder)
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(HANG, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28,) * 2)
    tempfile.tempdir = os.environ["TMPDIR"] = os.path.join(os.path.dirname(folder), "tmp")
    os.environ.update(HF_HUB_OFFLINE="1")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    from base import errors

    main = importlib.import_module(command).main
    sys.argv = [f"{command}.py", *argv]
    sys.addaudithook(_watch((os.path.realpath(folder), tempfile.tempdir)))
    code = errors.run(lambda _: main(argv))
    sys.stdout.flush()
    sys.exit(code)


def _watch(allowed: tuple[str, ...]):
    """Return an audit hook that reports writes outside the `allowed` folders, and connections, on stderr."""
    allowed += ("/dev/null", "/dev/shm", "/proc/self", os.path.join("/tmp", "pymp-"))
    # Event -> how many of its arguments are paths that it changes.
    one_path = dict.fromkeys(
        ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"), 1
    )
    places = one_path | dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple) -> None:
        count = bool(arguments[2] & writing) if event == "open" else places.get(event, 0)
        if event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
            count = 0  # relative to an open directory
        for path in arguments[:count]:
            if isinstance(path, int):
                continue
            real = os.path.realpath(os.fsdecode(path)).partition("\0")[0]
            exists = event == "os.mkdir" and os.path.isdir(real)  # then nothing is made
            if not real.startswith(allowed) and not exists:
                os.write(2, f"OUTSIDE: {event} {real!a}\n".encode())
        if event == "socket.connect" and not isinstance(arguments[1], str | bytes):
            os.write(2, f"OUTSIDE: {event} {arguments[1]!a}\n".encode())

    return hook


def execute(command: str, argv: list[str], folder: Path, log: Path, again: bool = True) -> tuple[int, str]:
    """Return the exit code (negative: a signal) and the whole output."""
    process = SERVER.Process(target=_child, args=(command, argv, str(folder), str(log)))
    process.start()
    process.join(HANG + 10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode == 255 and again:  # what multiprocessing says if it does not know how a child ended
        return execute(command, argv, folder, log, again=False)
    said = [Path(f"{log}{end}").read_text(errors="surrogateescape") for end in (".out", ".err")]
    return process.exitcode, "\n".join(said)


def judge(code: int, said: str, case: Case, before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return what is wrong with how a case ended."""
    wrong = [f"wrote outside: {line}" for line in re.findall(r"^OUTSIDE: (.*)", said, re.MULTILINE)]
    if re.search(r"^Timeout \(", said, re.MULTILINE):
        wrong += [f"hung for {HANG} s at {where(said, first=True)}"]
    elif code < 0:
        wrong += [f"died of {signal.Signals(-code).name}"]
    elif "Traceback (most" in said and not ("--debug" in case.argv and code in (2, 3, 4, 5, 6)):
        wrong += [f"traceback at {where(said)}: {said.strip().splitlines()[-1][:120]!a}"]
    elif code not in case.codes:
        wrong += [f"exit code {code}, not {case.codes}"]
    if code in range(2, 7) and not re.search(r"^error[^\n:]*: [^\n]+\nfix: [^\n]+\n", said, re.MULTILINE):
        wrong += ["no `error:` line with a `fix:` line below it"]
    if odd := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\udc80-\udcff]", said):
        line = said[max(odd.start() - 60, 0) : odd.end()].splitlines()[-1]
        wrong += [f"raw {odd[0]!a} in the output: {line!a}"]
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    # Bad data may be found late, but flags and checkpoints are checked before anything is written.
    if code in (2, 4) and changed:
        wrong += [f"refused, but files changed: {', '.join(changed)[:200]}"]
    return wrong + [f"files of another person changed: {name}" for name in FOREIGN if name in changed]


def where(said: str, first: bool = False) -> str:
    """Return the file and line of this project where a traceback ends, or where a dump begins."""
    frames = re.findall(rf'File "{ROOT}/((?!tests)[^"]+)", line (\d+)', said)
    return ":".join(frames[0 if first else -1]) if frames else "?"


def run(case: Case, files: Path, root: Path, number: int) -> list[str]:
    folder = root / str(number) / "here"
    shutil.copytree(files, folder)
    (folder.parent / "tmp").mkdir()
    (folder.parent / "neighbour").write_text("of another person")
    case.spoil(folder)
    before = listing(folder)
    code, said = execute(case.command, case.argv, folder, root / str(number) / "log")
    wrong = judge(code, said, case, before, listing(folder))
    if not wrong:
        shutil.rmtree(root / str(number))
    return wrong


def shown(case: Case) -> str:
    """Return the command line, with names for the arguments that many cases share."""
    text = f"{case.command} {case.argv!a}".replace(f"{TINY!a}"[1:-1], "*TINY")
    return text.replace(f"{FOLDERS!a}"[1:-1], "*FOLDERS")


def run_all(cases: list[Case], files: Path, root: Path) -> dict[str, list[str]]:
    """Run two cases at a time; return {kind of failure: the cases in which it happened}."""
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda k: run(cases[k], files, root, k), range(len(cases)))
        for case, wrong in zip(cases, results, strict=True):
            for what in wrong:
                kind, _, detail = what.partition(": ")
                found.setdefault(kind, []).append(f"{detail}\n    {case.name}: {shown(case)}")
    return found


# --- random command lines ----------------------------------------------------------------------------


def command_line(rng: random.Random, name: str, files: Path) -> Case:
    command = "train" if rng.random() < 0.8 else rng.choice(list(OTHERS))
    argv = list(OTHERS.get(command) or train_mode(rng))
    parser = importlib.import_module(command).build_parser()
    actions = [action for name, action in parser.flags.items() if name not in SLOW]
    for action in rng.sample(actions, min(len(actions), rng.choice((0, 1, 1, 2, 3, 5, 8)))):
        argv += spelled(rng, action)
    if rng.random() < 0.05:
        del argv[rng.randrange(len(argv))]
    if rng.random() < 0.05:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(ODD_TEXT + PATHS))
    return Case(name, command, argv)


MODES = ("", "", "", "--stop-after 9", "--dry-run", "--summary", "--save-dir run --overwrite")
MODES += ("--resume auto", f"--resume {HALF}", f"--init-from {LAST}", "data", "packed")


def train_mode(rng: random.Random) -> list[str]:
    """Return the first arguments of train.py in one of its modes."""
    mode = rng.choice(MODES)
    if mode.startswith("--resume"):
        return [*mode.split(), "--save-dir", rng.choice(("half", "half", "run", "new"))]
    if mode in ("data", "packed"):
        return [*FOLDERS, mode, "--save-dir", "new", "--stop-after", "2"]
    return [*TINY, "--save-dir", "new", "--stop-after", "2", *mode.split()]


def spelled(rng: random.Random, action: argparse.Action) -> list[str]:
    """Return a flag with a value, which it may or may not accept."""
    flag = rng.choice(action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [flag] if rng.random() < 0.95 else [f"{flag}={rng.choice(ODD_TEXT)}"]
    pool = NAMES.get(flag) or (PATHS if action.type is None and not action.choices else (*NUMBERS, *ODD_TEXT))
    if rng.random() < 0.7:
        pool = [*(action.choices or ()), *filter(lambda text: accepts(action, text), pool)] or pool
    value = rng.choice(pool)
    if action.dest == "arch" and "resnet_tiny" not in value and "resnet18" not in value:
        return [flag, value, "--summary"]  # too large to train here
    return rng.choice(([flag, value], [flag])) if rng.random() < 0.1 else [f"{flag}={value}"]


def accepts(action: argparse.Action, text: str) -> bool:
    try:
        value = action.type(text) if action.type else text
    except Exception:  # the case itself will show whether this is handled
        return False
    return not action.choices or value in action.choices


# --- damaged content: trees of dicts and lists in which some places are changed ----------------------


def doubled(value):
    for _ in range(64):
        value = [value, value]
    return value


DAMAGE: dict[str, Callable] = {
    "gone": None, "renamed": None, "circle": None,  # done by `damage`
    "none": lambda v: None, "true": lambda v: True,
    "text": lambda v: str(v)[:99], "five": lambda v: "5", "long": lambda v: "x" * 100_000,
    "escape": lambda v: "\x1b[31m\x07\x00", "surrogate": lambda v: "\udcff",
    "climbs": lambda v: "/../../../neighbour", "zero": lambda v: 0, "one": lambda v: 1,
    "minus one": lambda v: -1, "minus": lambda v: -5, "half": lambda v: 0.5, "large": lambda v: 2**40,
    "huge": lambda v: 10**30, "nan": lambda v: math.nan, "inf": lambda v: math.inf, "listed": lambda v: [v],
    "mapped": lambda v: {"x": v}, "shared": doubled,
    "emptied": lambda v: {} if isinstance(v, dict) else [] if isinstance(v, list) else "",
    "tensor": lambda v: torch.zeros(3), "twice": lambda v: v + v if isinstance(v, list | str) else [v, v],
    "cut": lambda v: v[:-1] if isinstance(v, list | str) else {},
}  # fmt: skip
NO_TEXT = {"circle", "tensor", "shared"}  # what JSON cannot express; YAML can express the last
TENSORS: dict[str, Callable] = {
    "resized": lambda t: torch.zeros(2, 3, 5), "grown": lambda t: torch.cat([torch.atleast_1d(t)] * 2),
    "no elements": lambda t: t.new_zeros(0), "int8": lambda t: t.to(torch.int8),
    "double": lambda t: t.double(), "half": lambda t: t.half(), "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64), "negative": lambda t: t - t.abs() - 1,
    "not finite": lambda t: t * math.nan, "a view": lambda t: torch.zeros(()).expand(t.shape),
    "meta": lambda t: t.to("meta"), "billions": lambda t: torch.zeros(1).expand(10**10),
    "sparse": lambda t: torch.zeros(4, 4).to_sparse(), "a number": lambda t: 1.5,
    "flat": lambda t: t.reshape(-1), "requires grad": lambda t: torch.nn.Parameter(t.float()),
}  # fmt: skip


def damage(tree, path: tuple, how: str) -> None:
    """Change `tree` at `path`, unless an earlier change has removed that place."""
    *above, key = path
    with suppress(KeyError, IndexError, TypeError, AttributeError):
        for step in above:
            tree = None if torch.is_tensor(tree) else tree[step]
        if how == "gone":
            del tree[key]
        elif how == "renamed":
            tree["\x1b[7m" + str(key)] = tree.pop(key)
        elif how == "circle":
            tree[key] = tree
        else:
            tree[key] = (TENSORS if how in TENSORS and torch.is_tensor(tree[key]) else DAMAGE)[how](tree[key])


def somewhere(rng: random.Random, tree, kinds: list[str], *path) -> tuple[tuple, str]:
    """Return a random place (below `path`), and the change to make there."""
    path, node = list(path), tree[path[0]] if path else tree
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.85):
        path.append(rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node)))
        node = node[path[-1]]
    return tuple(path), rng.choice(list(TENSORS) if torch.is_tensor(node) and rng.random() < 0.8 else kinds)


USES = {  # of a checkpoint
    "resume auto": ("train", ["--resume", "auto", "--save-dir", "half", "--stop-after", "9"]),
    "resume": ("train", ["--resume", HALF, "--save-dir", "new", "--stop-after", "9"]),
    "init": ("train", [*TINY, "--init-from", HALF, "--save-dir", "new", "--stop-after", "1"]),
    **{name: (name, argv) for name, argv in OTHERS.items() if argv[0] == HALF},
    "export": ("predict", [HALF, "--export", "safetensors", "--out", "new", "--device", "cpu"]),
    "torchvision": ("predict", [HALF, "--export", "torchvision", "--out", "new", "--device", "cpu"]),
}


def checkpoint_case(
    name: str, use: str, changes: list[tuple[tuple, str]], files: Path, codes=Case.codes
) -> Case:
    """Return a case in which HALF has `changes`, in an intact file with correct checksums."""

    def spoil(folder: Path) -> None:
        content = torch.load(files / HALF, weights_only=True)
        for path, how in changes:
            damage(content, path, how)
        for path in (folder / "half").glob("*.pt"):
            path.unlink()
        torch.save(content, folder / HALF)

    command, argv = USES[use]
    words = "; ".join("/".join(map(str, path)) + " " + how for path, how in changes)
    return Case(f"{name} ({words!a})", command, list(argv), spoil, codes)


def damaged_checkpoint(rng: random.Random, name: str, files: Path) -> Case:
    content, use = torch.load(files / HALF, weights_only=True), rng.choice(("resume auto", "resume", *USES))
    # Half of the changes are in a part that only this kind of use reads.
    asking, training = ("eval", "eval", "model_args", "ema"), ("config", "optimizer", "rows", "best")
    read = rng.choice(asking if USES[use][1][0] == HALF else training)
    changes = [
        somewhere(rng, content, list(DAMAGE), *([read] if rng.random() < 0.5 else []))
        for _ in range(rng.choice((1, 1, 1, 2, 3)))
    ]
    # An optimizer tensor of another size or type makes the steps wrong: it must be refused.
    must_refuse = use.startswith("resume") and any(
        path[0] == "optimizer"
        and path[-1] in ("exp_avg", "exp_avg_sq")
        and how in ("resized", "grown", "int8", "bool", "no elements")
        for path, how in changes
    )
    return checkpoint_case(name, use, changes, files, (4,) if must_refuse else Case.codes)


READERS = {  # a file, and the command that reads it
    "packed/manifest.json": ("train", [*FOLDERS, "packed", "--save-dir", "new"]),
    "packed/train-16/00000.arrow": ("train", [*FOLDERS, "packed", "--save-dir", "new"]),
    "packed/train-labels.npy": ("train", [*FOLDERS, "packed", "--save-dir", "new"]),
    "run/metrics.jsonl": ("analysis.report", ["run", "--no-pictures"]),
    "run/steps.jsonl": ("analysis.report", ["run", "--no-pictures"]),
    "run/config.json": ("analysis.report", ["run", "--no-pictures"]),
    "run/env.json": ("analysis.report", ["run", "half", "--no-pictures", "--out", "new.html"]),
    "half/metrics.jsonl": ("analysis.plots", ["half"]),
    "half/config.json": ("analysis.report", ["--list", "."]),
    "flags.yaml": ("train", [*TINY, "--config", "flags.yaml", "--save-dir", "new", "--stop-after", "1"]),
}
LAUGHS = (
    b"phase_epochs: [&a0 [1, 1]"
    + b"".join(b", &a%d [*a%d, *a%d]" % (k, k - 1, k - 1) for k in range(1, 60))
    + b"]\n"
)
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda b: b"", "cut": lambda b: b[: len(b) // 2],
    "bad UTF-8": lambda b: b[:9] + b"\xff\xfe" + b[9:], "NUL": lambda b: b[:9] + b"\0" + b[9:],
    "zeros": lambda b: bytes(len(b)), "twice": lambda b: b + b, "text": lambda b: b'"x"',
    "deep list": lambda b: b"[" * 5000, "deep map": lambda b: b'{"a":' * 5000, "a five": lambda b: b"5\n" + b,
    "BOM": lambda b: b"\xef\xbb\xbf" + b, "escape": lambda b: b"\x1b[31m" + b,
    "nan": lambda b: b.replace(b"1", b"NaN", 3),
    "huge number": lambda b: re.sub(rb"\d+", b"9" * 5000, b, count=1), "laughs": lambda b: LAUGHS,
    "an object": lambda b: b"!!python/object/apply:os.system [touch ../neighbour]\n",
    "a date": lambda b: b"epochs: 2020-01-01\n", "a set": lambda b: b"augment: !!set {flip}\n",
    "off": lambda b: b"amp: off\nwandb: no\nphase_mix: [on, off]\n", "a number key": lambda b: b"1: 2\n",
    "list key": lambda b: b"? [a, b]\n: 1\n",
}  # fmt: skip


def file_case(name: str, file: str, how: str | list, codes=Case.codes) -> Case:
    """Return a case in which `file` has other bytes (`how`: a key of BYTES) or other content (changes)."""

    def spoil(folder: Path) -> None:
        path = folder / file
        if isinstance(how, str):
            path.write_bytes(BYTES[how](path.read_bytes()))
            return vouch(path) if path.suffix == ".arrow" else None
        tree = content_of(path)
        for place, change in how:
            damage(tree, place, change)
        path.write_text(text_of(path, tree), encoding="utf-8", errors="surrogateescape")

    command, argv = READERS[file]
    return Case(f"{name} ({file}: {how!a})", command, list(argv), spoil, codes)


def vouch(shard: Path) -> None:
    """Write the shard's new size and checksum into the manifest."""
    manifest = shard.parents[1] / "manifest.json"
    found = json.loads(manifest.read_text())
    content = shard.read_bytes()
    found["tables"][shard.parent.name][0].update(bytes=len(content), crc32=zlib.crc32(content))
    manifest.write_text(json.dumps(found))


def content_of(path: Path):
    import yaml

    text = path.read_text()
    return [json.loads(row) for row in text.splitlines()] if path.suffix == ".jsonl" else yaml.safe_load(text)


def text_of(path: Path, tree) -> str:
    import yaml

    if path.suffix == ".yaml":
        return yaml.dump(tree, allow_unicode=True)
    return "\n".join(map(json.dumps, tree)) + "\n" if path.suffix == ".jsonl" else json.dumps(tree)


def damaged_file(rng: random.Random, name: str, files: Path) -> Case:
    file = rng.choice(list(READERS))
    if not file.endswith(("json", "jsonl", "yaml")) or rng.random() < 0.3:
        return file_case(name, file, rng.choice(list(BYTES)))
    kinds = [kind for kind in DAMAGE if kind not in NO_TEXT or (kind == "shared" and file.endswith("yaml"))]
    count = rng.choice((1, 1, 2))
    return file_case(name, file, [somewhere(rng, content_of(files / file), kinds) for _ in range(count)])


KINDS = {"lines": command_line, "checkpoints": damaged_checkpoint, "files": damaged_file}


def cases(kind: str, seed: int, count: int, files: Path, only: str = "") -> list[Case]:
    """Return `count` random cases of a kind, or only the one whose number is given."""
    again = f"make fuzz ARGS='-k {kind}' FUZZ_SEED={seed} FUZZ_CASE="
    numbers = [int(only)] if only else range(count)
    return [KINDS[kind](random.Random(f"{kind} {seed} {k}"), f"{again}{k}", files) for k in numbers]
