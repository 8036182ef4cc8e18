"""Schemas of all files that the project reads; `check` returns a value that matches its schema, or raises.

Checks are strict: neither a bool nor '5' is an int. Checkpoints and manifests may have no unknown fields;
rows, flags and env.json may, with plain values. Import this only where a file is read: pydantic takes 0.1 s.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    InstanceOf,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import NotRequired, TypedDict

from base.errors import CheckpointError, DataError, UserError, one_line

TRAIN_PY = "use a checkpoint that train.py wrote"
MAX_VALUES, MAX_DEPTH = 2_000_000, 8  # of a checkpoint; ours have thousands, five deep


# --- values -----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return `value` if it may be the value of a flag: a plain value or a list of them."""
    for item in value if type(value) is list else [value]:
        whole = type(item) is int and abs(item) < 2**63
        if not (item is None or whole or type(item) in (bool, float, str)):
            raise ValueError("should be a plain value or a list of them")
    return list(value) if type(value) is list else value


def _all_plain(values: dict) -> dict:
    return {key: _plain(value) for key, value in values.items()}


def _tensor(value: Any) -> Any:
    import torch

    strided = type(value) is torch.Tensor and value.layout is torch.strided
    if not strided or value.is_quantized or value.is_meta:
        raise ValueError("should be a plain tensor")
    return value


def _optimizer_value(value: Any) -> Any:
    return value if value is None or type(value) in (int, float) else _tensor(value)


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("should be a number")
    return value


def _utf8(value: str) -> str:
    value.encode()  # raises a UnicodeEncodeError, which is a ValueError
    return value


Text = InstanceOf[str]  # not pydantic's str, which must be UTF-8: names on a disk need not be
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e15)]
Norm = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of a gradient: may be huge
Percent = Annotated[float, Field(ge=0, le=100)]
Score = Annotated[float, Field(ge=-1, le=100)]  # percent; -1 before the first one
Fraction = Annotated[float, Field(ge=0, lt=1)]
Means = Annotated[list[Annotated[float, Field(ge=-10, le=10)]], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(min_length=3, max_length=3)]
FileName = Annotated[str, Field(pattern=r"^\w[\w .+@=-]{0,120}$")]  # part of file names: no path, not hidden
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}$")]
Names = Annotated[list[Annotated[Text, AfterValidator(_utf8)]], Field(min_length=1)]  # tables need UTF-8
Tensors = dict[Text, Annotated[Any, PlainValidator(_tensor)]]
Config = dict[Text, Annotated[Any, PlainValidator(_plain)]]  # flags, which the parser checks when used


# --- dictionaries -----------------------------------------------------------------------------------


def exactly(**fields: Any) -> Any:
    """Return the schema of a dict with these keys and no others."""
    schema = TypedDict("exactly", fields)
    schema.__pydantic_config__ = ConfigDict(extra="forbid")
    return schema


def at_least(**fields: Any) -> Any:
    """Return the schema of a dict with these keys, and others that are not checked."""
    schema = TypedDict("at_least", fields)
    schema.__pydantic_config__ = ConfigDict(extra="allow")
    return schema


def optional(**fields: Any) -> dict[str, Any]:
    return {name: NotRequired[kind] for name, kind in fields.items()}


def all_or_nothing(**fields: Any) -> Any:
    """Return the schema of a dict with exactly these keys, or of an empty one."""

    def judge(values: dict) -> dict:
        if values and (missing := fields.keys() - values.keys()):
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return values

    return Annotated[exactly(**optional(**fields)), AfterValidator(judge)]


# --- rows and checkpoints ---------------------------------------------------------------------------

COLUMNS = {  # of metrics.jsonl
    "epoch": Positive, "image_size": Pixels | None, "batch_size": Positive | None, "lr": NotNegative | None,
    "train_loss": float | None, "train_top1": Percent | None,
    "val_loss": float | None, "val_top1": Percent | None, "val_top5": Percent | None,
    "ema_val_loss": float | None, "ema_val_top1": Percent | None, "ema_val_top5": Percent | None,
    "images_per_second": NotNegative | None,
    "data_wait_percent": NotNegative | None, "seconds": NotNegative | None, "bad_steps": Count | None,
    "bad_images": Count | None, "best": bool | None,
}  # fmt: skip
# After the check a row has every column, None where the file has no value.
Row = Annotated[
    at_least(**optional(**COLUMNS) | {"epoch": Positive}),
    AfterValidator(lambda row: dict.fromkeys(COLUMNS) | _all_plain(row)),
]
STEP_COLUMNS = {  # of steps.jsonl
    "step": Positive, "epoch": Positive, "image_size": Pixels | None, "batch_size": Positive | None,
    "lr": NotNegative | None, "loss_scale": NotNegative | None, "train_loss": float | None,
    "grad_norm": Norm | None, "grad_norm_max": Norm | None, "images_per_second": NotNegative | None,
    "data_wait_percent": NotNegative | None, "bad_steps": Count | None,
}  # fmt: skip
StepRow = Annotated[
    at_least(**optional(**STEP_COLUMNS) | {"step": Positive, "epoch": Positive}),
    AfterValidator(lambda row: dict.fromkeys(STEP_COLUMNS) | _all_plain(row)),
]
ModelArgs = exactly(
    arch=Text,
    num_classes=Positive,
    **optional(drop_path_rate=Fraction, use_blurpool=bool, head=Text, stem=Text, image_sizes=list[Pixels]),
    **optional(width=Positive),
)
Eval = exactly(
    dataset=FileName,
    classes=Names,
    class_names=Names,
    mean=Means,
    std=Deviations,
    image_size=Pixels,
    crop=Annotated[float, Field(gt=0, le=1)],
    **optional(flip=bool, exif=bool),
)
Optimizer = exactly(
    # What a state may hold is up to the optimizer: see optim.saved.load_optimizer.
    state=dict[Count, dict[Text, Annotated[Any, PlainValidator(_optimizer_value)]]],
    param_groups=list[at_least(params=list[Count])],
)
Schedule = exactly(
    position=Count,
    last_lr=NotNegative,
    drops=Annotated[int, Field(ge=0, le=1000)],
    best=Annotated[float, AfterValidator(_not_nan)],  # infinite until plateau has seen a loss
    bad_evaluations=Count,
)
Scaler = all_or_nothing(  # empty except for fp16
    scale=Annotated[Finite, Field(gt=0)],
    growth_factor=Annotated[Finite, Field(gt=1)],
    backoff_factor=Annotated[float, Field(gt=0, lt=1)],
    growth_interval=Positive,
    _growth_tracker=Count,
)
EpochSums = at_least(
    loss=Finite, images=Count, seconds=NotNegative, waited=NotNegative, bad_steps=Count, bad_images=Count
)
RowSums = all_or_nothing(  # since the last row of steps.jsonl; empty just after it
    steps=Count, loss=Finite, norm=Norm, norm_max=Norm, bad_steps=Count, images=Count,
    seconds=NotNegative, waited=NotNegative,
)  # fmt: skip
Fingerprint = exactly(
    classes=Text, num_classes=Positive, train=Text, num_train=Count, val=Text, num_val=Count
)
Checkpoint = exactly(
    schema=Positive,
    model_args=ModelArgs,
    eval=Eval,
    model=Tensors,
    ema=all_or_nothing(shadow=Tensors, num_updates=Count),  # empty without EMA
    optimizer=Optimizer,
    schedule=Schedule,
    scaler=Scaler,
    step=Count,
    epoch_sums=Annotated[EpochSums, AfterValidator(_all_plain)],
    bad_in_a_row=Count,
    best=exactly(score=Score, epoch=Count, top=NotRequired[Score], waited=Count),
    rows=list[Row],
    config=Config,
    fingerprint=Fingerprint,
    precision=Annotated[str, Field(pattern=r"^[a-z0-9]{1,8}$")],
    total_steps=Positive,
    **optional(commit=Text, run=RunId, row_sums=Annotated[RowSums, AfterValidator(_all_plain)]),
    **optional(files=dict[Text, Crc32]),
)


def check_checkpoint(payload: dict, path: Path) -> dict:
    """Return a copy of `payload` that matches `Checkpoint`. Raises CheckpointError that names the field."""
    if problem := _too_large(payload):
        raise CheckpointError(f"{path} {problem}", TRAIN_PY)
    checked = check(Checkpoint, payload, str(path), CheckpointError, TRAIN_PY)
    if problem := _inconsistent(checked):
        raise CheckpointError(f"{path} {problem}", TRAIN_PY)
    return checked


def _too_large(payload: dict) -> str:
    """Return why `payload` is too large to be checked, or ''.

    Deeply nested lists, or one list in a thousand places, would take forever.
    """
    left, count = [(payload, 0)], 0
    while left:
        value, depth = left.pop()
        if not isinstance(value, dict | list | tuple):
            continue
        inside = [*value, *dict.values(value)] if isinstance(value, dict) else value
        count += len(inside)
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels"
        if count > MAX_VALUES:
            return f"holds over {MAX_VALUES:,} values"
        left += [(item, depth + 1) for item in inside]
    return ""


def _inconsistent(checkpoint: dict) -> str:
    """Return which fields of a checkpoint contradict each other, or ''."""
    classes, names = checkpoint["eval"]["classes"], checkpoint["eval"]["class_names"]
    rows, best = checkpoint["rows"], checkpoint["best"]["epoch"]
    if not len(classes) == len(names) == checkpoint["model_args"]["num_classes"]:
        return "has different numbers of classes in eval.classes, eval.class_names and model_args.num_classes"
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        return "has rows whose epochs do not count from 1"
    return f"has its best epoch {best} after its last row, {len(rows)}" if best > len(rows) else ""


def check_tensors(saved: dict, own: dict, what: str) -> None:
    """Raise CheckpointError unless names, shapes and dtypes agree. (`load_state_dict` converts dtypes.)"""
    for name in {**own, **saved}:
        mine, theirs = own.get(name), saved.get(name)
        if mine is None or theirs is None:
            problem = "lacks" if theirs is None else "has an unknown"
            raise CheckpointError(f"{what} {problem} {one_line(name)}", TRAIN_PY)
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            found, wanted = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (theirs, mine))
            raise CheckpointError(f"{what}.{name} is {found}, it should be {wanted}", TRAIN_PY)


# --- packed data ------------------------------------------------------------------------------------

Shard = exactly(rows=Count, bytes=Count, crc32=Crc32)
Skipped = exactly(id=Count, name=Text, reason=Text)
Part = exactly(images=Count, digest=Text, labels_bytes=Count, labels_crc32=Crc32, skipped=list[Skipped])
PLAN = {
    "format": Positive, "name": FileName, "classes": Names, "class_names": Names | None, "mean": Means,
    "std": Deviations, "native_size": Pixels | None, "sides": Annotated[list[Pixels], Field(min_length=1)],
    "quality": Annotated[int, Field(ge=1, le=100)], "source": Fingerprint,
    "shard_rows": exactly(train=Positive, val=Positive), **optional(raw_sides=list[Pixels], exif=bool),
}  # fmt: skip
Plan = exactly(**PLAN)  # packing.json
# manifest.json
Manifest = exactly(**PLAN, parts=exactly(train=Part, val=Part), tables=dict[Text, list[Shard]])
# a line of packing.jsonl
Record = exactly(part=Literal["train", "val"], k=Count, shards=dict[Text, Shard], skipped=list[Skipped])
CropRecord = exactly(crc32=Crc32, skipped=list[Skipped])  # of a shard of evaluation crops


def read_packing(path: str, schema: Any, version: int, fix: str) -> dict:
    """Return the content of manifest.json or packing.json. Raises DataError, also if its counts disagree."""
    found = read_json(path, dict[Text, Any], fix)
    if found.get("format") != version:
        newer = type(found.get("format")) is int
        unknown = ", ".join(sorted(found.keys() - Manifest.__annotations__.keys())) if newer else ""
        with_unknown = f" (with {one_line(unknown)[:200]})" if unknown else ""
        what = f"{path} does not describe a packed dataset, or one of another version{with_unknown}"
        raise DataError(what, "pack the data again")
    plan = check(schema, found, path, DataError, fix)
    classes, names = plan["classes"], plan["class_names"] or plan["classes"]
    if not len(classes) == len(names) == plan["source"]["num_classes"]:
        raise DataError(f"{path} has different numbers of classes in classes, class_names and source", fix)
    if "tables" in plan and (problem := _wrong_tables(plan)):
        raise DataError(f"{path}: {one_line(problem)}", fix)
    return plan


def _wrong_tables(manifest: dict) -> str:
    """Return which tables of a manifest contradict its other fields, or ''."""
    parts = {"val": "val"} | {f"train-{side}": "train" for side in manifest["sides"]}  # of each table
    if manifest["tables"].keys() != parts.keys():
        return f"tables should be {', '.join(parts)}, not {', '.join(manifest['tables'])}"
    for table, part in parts.items():
        shards, known = manifest["tables"][table], manifest["parts"][part]
        total, most = manifest["source"][f"num_{part}"], manifest["shard_rows"][part]
        images, skipped = known["images"], known["skipped"]
        if len(shards) != -(-total // most) or any(shard["rows"] > most for shard in shards):
            return f"tables.{table} does not hold {total} images in shards of {most}"
        if sum(shard["rows"] for shard in shards) != images:
            return f"tables.{table} does not hold the {images} images of parts.{part}"
        if images + len(skipped) != total or any(image["id"] >= total for image in skipped):
            return f"parts.{part}.skipped does not fit {images} of {total} images"
    return ""


# --- other JSON files -------------------------------------------------------------------------------

_COUNTS = optional(num_train=Count, num_val=Count, num_classes=Positive)
_RUN = optional(commit=Text, dataset=Text, command=Text, run=RunId, parent=Text | None)
Env = Annotated[at_least(**_COUNTS, **_RUN), AfterValidator(_all_plain)]
StudyRun = at_least(**optional(status=Text, flags=list[Text], minutes=NotNegative))  # run.json
ClassScore = at_least(name=Text, precision=NotNegative, recall=NotNegative, f1=NotNegative, support=Count)
# Earlier versions wrote guess_name.
Prediction = Annotated[Text, Field(validation_alias=AliasChoices("prediction_name", "guess_name"))]
ConfusedPair = at_least(truth_name=Text, prediction_name=Prediction, times=Count, share=NotNegative)
# scores.json of validate.py, as much of it as a report shows
Scores = at_least(results=list[Config], per_class=list[ClassScore], confused_pairs=list[ConfusedPair])
SplitFile = exactly(train=list[Text], val=list[Text])  # split.json


def read_json(path: Path | str, schema: Any, fix: str, missing: Any = None) -> Any:
    """Return the content of a JSON file, or `missing` if there is no file. Raises DataError."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise DataError(f"{path} is unreadable: {error.strerror}", fix) from None
    return parse_json(text, schema, str(path), fix)


def parse_json(text: bytes, schema: Any, where: str, fix: str) -> Any:
    """Return the JSON value `text`, checked. Raises DataError that says `where` it is and how to `fix` it."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is unreadable: {one_line(str(error))[:200]}", fix) from None
    return check(schema, value, where, DataError, fix)


# --- the check --------------------------------------------------------------------------------------

_adapter = cache(TypeAdapter)


def check(schema: Any, value: Any, where: str, error: type[UserError], fix: str) -> Any:
    """Return a copy of `value` that matches `schema`. Raises `error`, which names the first wrong field."""
    try:
        return _adapter(schema).validate_python(value, strict=True)
    except ValidationError as invalid:
        found = invalid.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise error(f"{where} contains itself", fix) from None
    field = one_line(".".join(map(str, found["loc"])))[:120]
    if found["type"] == "missing":
        raise error(f"{where} lacks {field}", fix)
    if found["type"] == "extra_forbidden":
        raise error(f"{where} has an unknown {field}", fix)
    message = one_line(found["msg"].removeprefix("Value error, ").replace("Input should", "should"))
    if "should" in message:
        message += f", not {_shown(found['input'])}"
    raise error(f"{where}: {field or 'it'} {message}", fix)


def _shown(value: Any) -> str:
    if type(value) is str:
        return one_line(repr(value[:40]))
    simple = value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63)
    return str(value) if simple else f"a {type(value).__name__}"
