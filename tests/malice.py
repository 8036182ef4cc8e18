"""Files that would run code, fill the memory or write outside their directory if their reader let them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from models import build_model

SENTINEL = "pwned"
TOUCH = f"touch {SENTINEL}"


class Calls:
    """An object whose unpickling calls `function(*arguments)`."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        call = (self.function, self.arguments)
        return call if self.state is None else (*call, self.state)


def raw(module: str, name: str, argument: str) -> bytes:
    """Return a pickle (protocol 2) that calls module.name(argument)."""
    text = argument.encode()
    function = b"\x80\x02c" + f"{module}\n{name}\n".encode()
    return function + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def archive(data: bytes, extra: dict | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file like those of torch.save, around any pickle."""
    entries = {"archive/data.pkl": data, "archive/byteorder": b"little", "archive/version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        entries |= extra or {}
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def pickled(value, protocol: int = 2) -> bytes:
    return archive(pickle.dumps(value, protocol))


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensor_claiming(
    elements: int, stored: int = 40, size: int | None = None, stride: int = 1, offset: int = 0
) -> bytes:
    """Return a file with a float tensor of `stored` bytes that claims to have `elements`."""
    size = elements if size is None else size

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if value == "the storage" else None

    buffer = io.BytesIO()
    build = Calls(
        torch._utils._rebuild_tensor_v2, "the storage", offset, (size,), (stride,), False, OrderedDict()
    )
    Pickler(buffer, 2).dump({"schema": 1, "w": build})
    return archive(buffer.getvalue(), {"archive/data/0": bytes(stored)})


def legacy(value) -> bytes:
    """Return a file as torch.save wrote them before 1.6: several pickles, no checksums."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tampered_directory() -> bytes:
    content = bytearray(saved({"schema": 1, "w": torch.zeros(10)}))
    end = content.rindex(b"PK\x05\x06")
    content[end + 16 : end + 20] = struct.pack("<I", 2**31)  # where the list of entries begins
    return bytes(content)


def overlapping() -> bytes:
    """Return a zip file whose entries share one body: small on disk, large when read."""
    content, body = bytearray(archive(b"x" * 100_000)), b""
    start = content.index(b"PK\x01\x02")
    length = content.index(b"PK\x01\x02", start + 4) - start
    entry, end = bytes(content[start : start + length]), content.rindex(b"PK\x05\x06")
    body = bytes(content[:start]) + entry * 2000
    tail = bytearray(content[end:])
    struct.pack_into("<HHII", tail, 8, 2000, 2000, 2000 * length, start)
    return body + bytes(tail)


def circle() -> bytes:
    value: list = []
    value.append(value)
    return saved({"schema": 1, "rows": value})


def deep(levels: int) -> bytes:
    return archive(b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b".")


def overridden_get() -> bytes:
    """Return a file with an OrderedDict whose `get` is a number."""
    return archive(b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x05sb.")


ARGS = {"arch": "resnet_tiny", "num_classes": 3}


def whole(**changes) -> dict:
    """Return the smallest content of a checkpoint that is accepted, with `changes`."""
    classes = ["a", "b", "c"]
    return {
        "model_args": ARGS,
        "config": {},
        "precision": "fp32",
        "total_steps": 9,
        "step": 3,
        "bad_in_a_row": 0,
        "rows": [],
        "eval": {"dataset": "x", "classes": classes, "class_names": classes[:], "mean": [0.5] * 3}
        | {"std": [0.5] * 3, "image_size": 8, "crop": 0.875},
        "model": {"w": torch.arange(300.0), "b": torch.ones(7)},
        "ema": {},
        "scaler": {},
        "optimizer": {"state": {}, "param_groups": []},
        "schedule": {"position": 3, "last_lr": 0.1, "drops": 0, "best": float("inf"), "bad_evaluations": 0},
        "epoch_sums": dict.fromkeys(("loss", "seconds", "waited"), 0.0)
        | dict.fromkeys(("images", "bad_steps", "bad_images"), 0),
        "best": {"score": -1.0, "epoch": 0, "waited": 0},
        "fingerprint": {"classes": "x", "train": "y", "val": "z"}
        | {"num_classes": 3, "num_train": 9, "num_val": 9},
    } | changes


WEIGHTS = build_model(**ARGS).state_dict()


def full(**changes) -> bytes:
    """Return a file that is accepted, but for `changes`."""
    return saved({"schema": 1} | whole(model=WEIGHTS) | changes)


PAYLOADS: dict[str, Callable[[], bytes]] = {
    # code
    "os.system": lambda: pickled(Calls(os.system, TOUCH)),
    "os.system, highest protocol": lambda: pickled(Calls(os.system, TOUCH), 5),
    "os.system, protocol 0": lambda: pickled(Calls(os.system, TOUCH), 0),
    "posix.system": lambda: archive(raw("posix", "system", TOUCH)),
    "eval": lambda: pickled(Calls(eval, f"open('{SENTINEL}', 'w')")),
    "exec": lambda: pickled(Calls(exec, f"open('{SENTINEL}', 'w')")),
    "subprocess": lambda: archive(raw("subprocess", "getoutput", TOUCH)),
    "open": lambda: pickled(Calls(open, SENTINEL, "w")),
    "importlib": lambda: archive(raw("importlib", "import_module", "antigravity")),
    "dotted global": lambda: archive(raw("torch", "serialization.os.system", TOUCH)),
    "torch.load inside": lambda: archive(raw("torch", "load", "x.pt")),
    "torch.hub": lambda: archive(raw("torch.hub", "load_state_dict_from_url", "https://example.org/x.pt")),
    "torch.jit": lambda: archive(raw("torch.jit", "load", "x.pt")),
    "numpy file": lambda: archive(raw("numpy", "memmap", SENTINEL)),
    "pickle.loads inside": lambda: pickled(Calls(pickle.loads, pickle.dumps(Calls(os.system, TOUCH)))),
    "builtins.getattr": lambda: pickled(Calls(getattr, "x", "__class__")),
    "among the weights": lambda: pickled({"schema": 1, "model": {"fc.weight": Calls(os.system, TOUCH)}}),
    "as a key": lambda: pickled({Calls(os.system, TOUCH): 1}),
    "state of a Path": lambda: pickled(Calls(Path, SENTINEL, state={"x": Calls(os.system, TOUCH)})),
    "extension registry": lambda: archive(b"\x80\x02\x82\x01."),
    "legacy format": lambda: legacy({"w": Calls(os.system, TOUCH)}),
    "legacy tensors with a schema": lambda: legacy({"schema": 1, "w": torch.zeros(3)}),
    "a bare pickle": lambda: pickle.dumps(Calls(os.system, TOUCH)),
    "code behind a tensor": lambda: pickled(
        [Calls(torch._utils._rebuild_parameter, Calls(os.system, TOUCH), False, {})]
    ),
    # wrong sizes
    "a tensor larger than its storage": lambda: tensor_claiming(10**6),
    "a tensor larger than any memory": lambda: tensor_claiming(2**60),
    "a negative count": lambda: tensor_claiming(-5, size=5),
    "a stride beyond the storage": lambda: tensor_claiming(10, size=10, stride=10**9),
    "an offset beyond the storage": lambda: tensor_claiming(10, size=10, offset=10**9),
    "a view of one number": lambda: full(model=WEIGHTS | {"fc.weight": torch.zeros(1).expand(10**9)}),
    "zip bomb": lambda: archive(b"\0" * 30_000_000, compression=zipfile.ZIP_DEFLATED),
    "overlapping entries": overlapping,
    "nested zip": lambda: archive(archive(archive(b"x"))),
    # structure
    "names that climb": lambda: archive(
        b"\x80\x02N.", {f"../../{SENTINEL}": b"x", f"/tmp/../{SENTINEL}": b"x"}
    ),
    "two archives in a row": lambda: saved({"a": 1}) + pickled(Calls(os.system, TOUCH)),
    "a directory at a wrong offset": tampered_directory,
    "no pickle": lambda: archive(b""),
    "nested too deeply": lambda: deep(200_000),
    "a circle": circle,
    "a dict with another get": overridden_get,
    "a step that is a text": lambda: full(step="1; touch pwned"),
    "a sparse tensor": lambda: full(model=WEIGHTS | {"fc.weight": torch.zeros(3, 3).to_sparse()}),
    "an unknown model": lambda: full(model_args=ARGS | {"arch": "__import__('os').system"}),
    "an impossibly large model": lambda: full(model_args=ARGS | {"num_classes": 10**12}),
    "unknown model arguments": lambda: full(model_args=ARGS | {"weights": "https://example.org/x.pt"}),
    "no weights": lambda: full(model={}),
}
UNREADABLE = (
    "a tensor larger than its storage", "a tensor larger than any memory", "a negative count",
    "a stride beyond the storage", "an offset beyond the storage", "names that climb",
    "two archives in a row", "no pickle",
)  # fmt: skip
REASONS = {  # words of the refusal; of all others "it contains code"
    **dict.fromkeys(UNREADABLE, "unreadable checkpoint"),
    **dict.fromkeys(("legacy tensors with a schema", "a directory at a wrong offset"), "lacks model_args"),
    **dict.fromkeys(("nested too deeply", "a dict with another get"), "holds weights only"),
    "a bare pickle": "not a complete file", "a view of one number": "it should be",
    "zip bomb": "compressed entries", "overlapping entries": "larger than the file",
    "a circle": "nested deeper", "a step that is a text": "should be a valid integer",
    "a sparse tensor": "should be a plain tensor", "an unknown model": "cannot be built",
    "an impossibly large model": "different numbers of classes", "no weights": "lacks conv1.weight",
    "unknown model arguments": "unknown model_args.weights",
}  # fmt: skip


def write(name: str, path: Path) -> Path:
    path.write_bytes(PAYLOADS[name]())
    return path
