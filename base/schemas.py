"""What every file of the project holds. Whoever reads one back uses the value that comes out of `check` here.

Strict: a bool is no int, '5' is no int. A checkpoint and a manifest may hold nothing unknown; rows, flags and env.json
may, as long as it is plain. Imported only inside functions that read a file: pydantic takes a tenth of a second.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import NotRequired, TypedDict

from base.errors import CheckpointError, DataError, UserError, one_line

CLOSED, OPEN = ConfigDict(extra="forbid"), ConfigDict(extra="allow")
TRAIN_PY = "use a checkpoint that train.py wrote"
MAX_VALUES, MAX_DEPTH = 2_000_000, 8  # of a checkpoint; ours have thousands, five deep

Text = InstanceOf[str]  # names on a disk need not be UTF-8, which pydantic's own str asks for
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e15)]
Percent = Annotated[float, Field(ge=0, le=100)]
Means = Annotated[list[Annotated[float, Field(ge=-10, le=10)]], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(min_length=3, max_length=3)]
FileName = Annotated[
    str, Field(pattern=r"^\w[\w .+@=-]{0,120}$")
]  # files are named after it: no path, nothing hidden
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}$")]


def _plain(value: Any) -> Any:
    """A flag's value: one of the simple types, or a list of them."""
    for item in value if type(value) is list else [value]:
        if not (
            item is None or type(item) in (bool, float, str) or (type(item) is int and abs(item) < 2**63)
        ):
            raise ValueError("should be a plain value or a list of them")
    return list(value) if type(value) is list else value


def _tensor(value: Any) -> Any:
    import torch

    if (
        type(value) is not torch.Tensor
        or value.layout is not torch.strided
        or value.is_quantized
        or value.is_meta
    ):
        raise ValueError("should be a plain tensor")
    return value


def _slot(value: Any) -> Any:
    """What an optimizer keeps under one name: a tensor, a number, or nothing."""
    return value if value is None or type(value) in (int, float) else _tensor(value)


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("should be a number")
    return value


def _utf8(value: str) -> str:
    value.encode()  # a UnicodeEncodeError is a ValueError; tables and pictures take nothing else
    return value


def _all_plain(values: dict) -> dict:
    return {key: _plain(value) for key, value in values.items()}


def _whole_or_empty(schema: Any) -> AfterValidator:
    def judge(values: dict) -> dict:
        if values and (missing := schema.__annotations__.keys() - values.keys()):
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return values

    return AfterValidator(judge)


Names = Annotated[list[Annotated[Text, AfterValidator(_utf8)]], Field(min_length=1)]
Plain = Annotated[Any, PlainValidator(_plain)]
Tensors = dict[Text, Annotated[Any, PlainValidator(_tensor)]]
Config = dict[Text, Plain]  # flags: judged one by one where they are used


class _Row(TypedDict, total=False):
    __pydantic_config__ = OPEN
    epoch: Positive
    image_size: Pixels | None
    batch_size: Positive | None
    lr: NotNegative | None
    train_loss: float | None
    train_top1: Percent | None
    val_loss: float | None
    val_top1: Percent | None
    val_top5: Percent | None
    ema_val_loss: float | None
    ema_val_top1: Percent | None
    ema_val_top5: Percent | None
    better: Literal["ema", "raw"] | None
    images_per_second: NotNegative | None
    data_wait_percent: NotNegative | None
    seconds: NotNegative | None
    bad_steps: Count | None
    bad_images: Count | None
    best: bool | None


COLUMNS = tuple(_Row.__annotations__)


def _all_columns(row: dict) -> dict:
    if "epoch" not in row:
        raise ValueError("lacks epoch")
    return dict.fromkeys(COLUMNS) | _all_plain(row)


# One epoch of metrics.jsonl: every column is there afterwards, None where the file has none.
Row = Annotated[_Row, AfterValidator(_all_columns)]


class ModelArgs(TypedDict):
    __pydantic_config__ = CLOSED
    arch: Text
    num_classes: Positive
    drop_path_rate: NotRequired[Annotated[float, Field(ge=0, lt=1)]]
    use_blurpool: NotRequired[bool]
    head: NotRequired[Text]
    stem: NotRequired[Text]
    image_sizes: NotRequired[list[Pixels]]


class Eval(TypedDict):
    __pydantic_config__ = CLOSED
    dataset: FileName
    classes: Names
    class_names: Names
    mean: Means
    std: Deviations
    image_size: Pixels
    crop: Annotated[float, Field(gt=0, le=1)]


class ParamGroup(TypedDict):
    __pydantic_config__ = OPEN  # the optimizer's options, which nothing takes from here
    params: list[Count]


class Optimizer(TypedDict):
    __pydantic_config__ = CLOSED
    state: dict[
        Count, dict[Text, Annotated[Any, PlainValidator(_slot)]]
    ]  # optim.load_state knows what belongs in it
    param_groups: list[ParamGroup]


class Schedule(TypedDict):
    __pydantic_config__ = CLOSED
    position: Count
    last_lr: NotNegative
    drops: Annotated[int, Field(ge=0, le=1000)]
    best: Annotated[float, AfterValidator(_not_nan)]  # infinite until plateau has seen a loss
    bad_evaluations: Count


class Scaler(TypedDict, total=False):  # empty but for fp16
    __pydantic_config__ = CLOSED
    scale: Annotated[Finite, Field(gt=0)]
    growth_factor: Annotated[Finite, Field(gt=1)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: Positive
    _growth_tracker: Count


class Average(TypedDict, total=False):  # empty without EMA
    __pydantic_config__ = CLOSED
    shadow: Tensors
    num_updates: Count


class EpochSums(TypedDict):
    __pydantic_config__ = OPEN  # for more counters
    loss: Finite
    images: Count
    seconds: NotNegative
    waited: NotNegative
    bad_steps: Count
    bad_images: Count


class Best(TypedDict):
    __pydantic_config__ = CLOSED
    score: Annotated[float, Field(ge=-1, le=100)]
    epoch: Count
    top: NotRequired[Annotated[float, Field(ge=-1, le=100)]]
    waited: Count


class Fingerprint(TypedDict):
    __pydantic_config__ = CLOSED
    classes: Text
    num_classes: Positive
    train: Text
    num_train: Count
    val: Text
    num_val: Count


class Checkpoint(TypedDict):
    __pydantic_config__ = CLOSED
    schema: Positive
    model_args: ModelArgs
    eval: Eval
    model: Tensors
    ema: Annotated[Average, _whole_or_empty(Average)]
    optimizer: Optimizer
    schedule: Schedule
    scaler: Annotated[Scaler, _whole_or_empty(Scaler)]
    step: Count
    epoch_sums: Annotated[EpochSums, AfterValidator(_all_plain)]
    bad_in_a_row: Count
    best: Best
    rows: list[Row]
    config: Config
    fingerprint: Fingerprint
    precision: Annotated[str, Field(pattern=r"^[a-z0-9]{1,8}$")]
    total_steps: Positive
    commit: NotRequired[Text]
    run: NotRequired[RunId]


def check_checkpoint(payload: dict, path: Path) -> dict:
    """Raises CheckpointError that names the field."""
    if too_large := _too_large(payload):
        raise CheckpointError(f"{path} {too_large}", TRAIN_PY)
    checked = check(Checkpoint, payload, str(path), CheckpointError, TRAIN_PY)
    facts, rows = checked["eval"], checked["rows"]
    wrong = ""
    if not len(facts["classes"]) == len(facts["class_names"]) == checked["model_args"]["num_classes"]:
        wrong = "names other numbers of classes in eval.classes, eval.class_names and model_args.num_classes"
    elif [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        wrong = "has rows that do not count the epochs from 1"
    elif checked["best"]["epoch"] > len(rows):
        wrong = f"has its best epoch {checked['best']['epoch']} after its last row, {len(rows)}"
    if wrong:
        raise CheckpointError(f"{path} {wrong}", TRAIN_PY)
    return checked


def _too_large(payload: dict) -> str:
    """Lists in each other, or one list in a thousand places, would take for ever to look through."""
    left, count = [(payload, 0)], 0
    while left:
        value, depth = left.pop()
        if not isinstance(value, dict | list | tuple):
            continue
        inside = [*value, *dict.values(value)] if isinstance(value, dict) else value
        count += len(inside)
        if depth > MAX_DEPTH or count > MAX_VALUES:
            return (
                f"is nested deeper than {MAX_DEPTH}"
                if depth > MAX_DEPTH
                else f"holds over {MAX_VALUES:,} values"
            )
        left += [(item, depth + 1) for item in inside]
    return ""


def check_tensors(saved: dict, own: dict, what: str) -> None:
    """`load_state_dict` would copy across dtypes without a word. Raises CheckpointError."""
    for name in {**own, **saved}:
        mine, theirs = own.get(name), saved.get(name)
        if mine is None or theirs is None:
            raise CheckpointError(
                f"{what} {'lacks' if theirs is None else 'has an unknown'} {one_line(name)}", TRAIN_PY
            )
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise CheckpointError(
                f"{what}.{name} is {tuple(theirs.shape)} {theirs.dtype}, "
                f"it should be {tuple(mine.shape)} {mine.dtype}",
                TRAIN_PY,
            )


class Shard(TypedDict):
    __pydantic_config__ = CLOSED
    rows: Count
    bytes: Count
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


class Skipped(TypedDict):
    __pydantic_config__ = CLOSED
    id: Count
    name: Text
    reason: Text


class Part(TypedDict):
    __pydantic_config__ = CLOSED
    images: Count
    digest: Text
    labels_bytes: Count
    labels_crc32: Annotated[int, Field(ge=0, lt=2**32)]
    skipped: list[Skipped]


class ShardRows(TypedDict):
    __pydantic_config__ = CLOSED
    train: Positive
    val: Positive


class Parts(TypedDict):
    __pydantic_config__ = CLOSED
    train: Part
    val: Part


class Plan(TypedDict):
    """packing.json."""

    __pydantic_config__ = CLOSED
    format: Positive
    name: FileName
    classes: Names
    class_names: Names | None
    mean: Means
    std: Deviations
    native_size: Pixels | None
    sides: Annotated[list[Pixels], Field(min_length=1)]
    quality: Annotated[int, Field(ge=1, le=100)]
    source: Fingerprint
    shard_rows: ShardRows


class Manifest(Plan):
    """manifest.json."""

    __pydantic_config__ = CLOSED
    parts: Parts
    tables: dict[Text, list[Shard]]


def read_packing(path: str, schema: Any, version: int, fix: str) -> dict:
    """manifest.json or packing.json, whose counts agree with each other. Raises DataError."""
    found = read_json(path, dict[Text, Any], fix)
    if found.get("format") != version:
        newer = type(found.get("format")) is int
        unknown = ", ".join(sorted(found.keys() - Manifest.__annotations__.keys())) if newer else ""
        raise DataError(
            f"{path} is not of a packed dataset, or of another version"
            + (f" (with {one_line(unknown)[:200]})" if unknown else ""),
            "pack the data again",
        )
    plan = check(schema, found, path, DataError, fix)
    names = [plan["classes"], plan["class_names"] or plan["classes"]]
    if not len(names[0]) == len(names[1]) == plan["source"]["num_classes"]:
        raise DataError(f"{path} names other numbers of classes in classes, class_names and source", fix)
    if "tables" in plan and (wrong := _wrong_tables(plan)):
        raise DataError(f"{path}: {one_line(wrong)}", fix)
    return plan


def _wrong_tables(manifest: dict) -> str:
    wanted = {"val": "val"} | {f"train-{side}": "train" for side in manifest["sides"]}
    if manifest["tables"].keys() != wanted.keys():
        return f"tables should be {', '.join(wanted)}, not {', '.join(manifest['tables'])}"
    for table, part in wanted.items():
        shards, known, total = (
            manifest["tables"][table],
            manifest["parts"][part],
            manifest["source"][f"num_{part}"],
        )
        most = manifest["shard_rows"][part]
        if len(shards) != -(-total // most) or any(shard["rows"] > most for shard in shards):
            return f"tables.{table} does not hold {total} images in shards of {most}"
        if sum(shard["rows"] for shard in shards) != known["images"]:
            return f"tables.{table} does not hold the {known['images']} images of parts.{part}"
        if known["images"] + len(known["skipped"]) != total or any(
            image["id"] >= total for image in known["skipped"]
        ):
            return f"parts.{part}.skipped does not fit {known['images']} of {total} images"
    return ""


class Record(TypedDict):
    """A line of packing.jsonl."""

    __pydantic_config__ = CLOSED
    part: Literal["train", "val"]
    k: Count
    shards: dict[Text, Shard]
    skipped: list[Skipped]


class _Env(TypedDict, total=False):
    __pydantic_config__ = OPEN
    num_train: Count
    num_val: Count
    num_classes: Positive
    commit: Text
    command: Text
    run: RunId
    parent: Text | None


Env = Annotated[_Env, AfterValidator(_all_plain)]


class StudyRun(TypedDict, total=False):
    """run.json."""

    __pydantic_config__ = OPEN
    status: Text
    flags: list[Text]


class ClassScore(TypedDict):
    name: Text
    precision: NotNegative
    recall: NotNegative
    f1: NotNegative
    support: Count


class ConfusedPair(TypedDict):
    truth_name: Text
    guess_name: Text
    times: Count
    share: NotNegative


class Scores(TypedDict):
    """scores.json of validate.py, as much of it as a report shows."""

    results: list[Config]
    per_class: list[ClassScore]
    confused_pairs: list[ConfusedPair]


LabelNames = dict[Text, Any]  # Labels.json of Kaggle


def read_json(path: Path | str, schema: Any, fix: str, missing: Any = None) -> Any:
    """What the file holds; `missing` where it is not there. Raises DataError where it is not what it should be."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise DataError(f"{path} is unreadable: {error.strerror}", fix) from None
    return parse_json(text, schema, str(path), fix)


def parse_json(text: bytes, schema: Any, where: str, fix: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is unreadable: {one_line(str(error))[:200]}", fix) from None
    return check(schema, value, where, DataError, fix)


_adapter: Callable[[Any], TypeAdapter] = cache(TypeAdapter)


def check(schema: Any, value: Any, where: str, error: type[UserError], fix: str) -> Any:
    """`value` as `schema` says it is, made anew. Raises `error`: one line with the first field that is wrong."""
    try:
        return _adapter(schema).validate_python(value, strict=True)
    except ValidationError as invalid:
        found = invalid.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise error(f"{where} holds a circle", fix) from None
    field = one_line(".".join(map(str, found["loc"])))[:120]
    if found["type"] == "missing":
        raise error(f"{where} lacks {field}", fix)
    if found["type"] == "extra_forbidden":
        raise error(f"{where} has an unknown {field}", fix)
    message = found["msg"].removeprefix("Value error, ").replace("Input should", "should")
    raise error(f"{where}: {field or 'it'} {one_line(message)}, not {_shown(found['input'])}", fix)


def _shown(value: Any) -> str:
    """Short, whatever it is."""
    simple = value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63)
    return (
        str(value)
        if simple
        else one_line(repr(value[:40]))
        if type(value) is str
        else f"a {type(value).__name__}"
    )
