"""Invalid files: every field of each kind of file, if deleted or wrong, is refused by its name."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from inprocess import TINY, config_of, tiny_run
from test_packed import make_folders

import pack_dataset
import train
import validate
from ablation_runs import results
from analysis import report, runs
from base import errors, schemas
from base.errors import CheckpointError, DataError
from base.files import file_crc32
from harness import checkpoint, rundir
from optim import OPTIMIZERS, build_optimizer
from optim.saved import load_optimizer
from sources import packed

FOREIGN = [None, "5", True, 1.5, -50, 10**30, float("nan"), [], {}, [[[]]], "\x1b[31m\nred"]


def places(value, at=()):
    """Yield the place of everything in `value`; the first item of a list stands for all."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield (*at, key), item
        yield from places(item, (*at, key))


def changed(content, at, *new):
    """Return a copy with `new` at a place, or without that place; tensors are shared."""
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
    """Return what must be refused in place of `value`: other types, and numbers that no field may have."""
    number = type(value) in (int, float)
    for new in FOREIGN:
        as_good = type(new) is type(value) and (not number or new == 1.5) and new != []
        if not (as_good or (type(value) is float and new == 1.5)):
            yield new
    if isinstance(value, torch.Tensor):
        yield from (
            value.to(torch.int8),
            value.double(),
            value[None],
            value.flatten().repeat(3),
            value.to_sparse(),
        )


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
    """A run that could resume from it."""
    return tiny_run(tmp_path_factory.mktemp("run")), config_of()


OPTIONAL = {
    "run",
    "commit",
    "head",
    "stem",
    "top",
    "drop_path_rate",
    "use_blurpool",
    "image_sizes",
    "flip",
    "exif",
}
OPTIONAL |= {"row_sums", "width"}


def is_free(at: tuple) -> bool:
    """Flags are judged as flags, options of the optimizer are not taken, and a few tensors stand for all."""
    flag = at[0] == "config" and len(at) > 1
    option = "param_groups" in at and len(at) > 3 and "params" not in at
    weight = at[-2:][0] in ("model", "shadow") and at[-1] not in ("conv1.weight", "bn1.num_batches_tracked")
    moment = at[:2] == ("optimizer", "state") and len(at) > 2 and at[2] not in (0, 37)
    return flag or option or weight or moment


def mutations(payload):
    for at, value in places(payload):
        if is_free(at):
            continue
        name, in_row = str(at[-1]), at[0] == "rows" and len(at) == 3 and at[2] != "epoch"
        any_number = "loss" in name or at == ("schedule", "best") or (at[0] == "row_sums" and "norm" in name)
        if not (name in OPTIONAL or in_row or "image_sizes" in at):
            yield at, ()
        for new in foreign(value):
            number = type(new) in (int, float) and any_number and (new == new or in_row)
            if not (number or (in_row and new is None) or (name == "image_sizes" and new == [])):
                yield at, (new,)


def judge(payload, run, path) -> None:
    built, config = run
    rundir.restore(built, schemas.check_checkpoint(payload, path), config)


def test_every_field_of_a_checkpoint_deleted_or_made_wrong_is_refused(payload, run, tmp_path):
    accepted, count = [], 0
    for at, new in mutations(payload):
        count += 1
        try:
            judge(changed(payload, at, *new), run, tmp_path / "last_x.pt")
        except CheckpointError as error:
            assert error.exit_code == 4 and error.what.isprintable(), (at, new, error.what)
        else:
            accepted.append((at, new))
    assert not accepted and count > 500, f"{len(accepted)} of {count}: {accepted}"
    judge(payload, run, tmp_path / "last_x.pt")


@pytest.mark.parametrize("at, new, words", [
    (("eval", "crop"), 0, r"eval.crop should be greater than 0, not 0"),
    (("model_args", "weights"), "x", "unknown model_args.weights"),
    (("config",), {"x": {"y": 1}}, "config.x should be a plain value"),
    (("rows",), [5], "rows.0 should be a valid dictionary, not 5"),
    (("eval", "classes"), ["a"], "different numbers of classes"),
    (("best", "epoch"), 3, "best epoch 3 after its last row, 2"),
    (("ema",), {"num_updates": 1}, "ema lacks shadow"), (("step",), 4, "2 finished epochs and step 4"),
    (("step",), 2**60, "step"),
    (("model", "conv1.weight"), torch.zeros(8, 3, 7, 7).half(),
     "model.conv1.weight is .*float16, it should be .*float32"),
    (("new\x1b[31m\n",), 1, r"unknown new\\x1b\[31m\\n"),
])  # fmt: skip
def test_a_wrong_field_is_named_with_exit_code_4(payload, tmp_path, capsys, at, new, words):
    path = tmp_path / "last_x.pt"
    torch.save(changed(payload, at, new), path)
    arguments = ["--resume", str(path), "--save-dir", str(tmp_path / "new")]
    assert errors.run(lambda _: train.main(arguments)) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(said) == 2 and said[0].startswith("error: ") and said[1].startswith("fix: ")
    with pytest.raises(CheckpointError, match=words):
        train.main(arguments)


def test_lists_in_lists_and_one_list_in_many_places_take_no_time(payload, tmp_path):
    circle, many = [], ["x"] * 50_000
    circle.append(circle)
    laughs = ["x"] * 10
    for _ in range(12):
        laughs = [laughs] * 10
    for content in (circle, laughs, {str(k): many for k in range(50_000)}):
        torch.save(
            {**payload, "config": {"x": content} if isinstance(content, list) else content}, tmp_path / "x.pt"
        )
        with pytest.raises(CheckpointError, match=r"nested deeper|holds over"):
            checkpoint.load(tmp_path / "x.pt")


def test_older_and_slightly_newer_checkpoints_load(payload, run, tmp_path):
    older = changed(payload, ("epoch_sums",), {**payload["epoch_sums"], "more": 3})
    for content in (
        older,
        {**payload, "run": "0123abcd"},
        changed(payload, ("best",), {**payload["best"], "top": 5.0}),
    ):
        judge(content, run, tmp_path / "last_x.pt")
    state = run[0].state
    assert "more" not in state.epoch_sums and state.best.keys() == tiny_run(tmp_path).state.best.keys()


def test_weights_of_another_type_are_refused_by_every_tool(payload, tmp_path):
    for name in ("model", "ema"):
        content = dict(payload)
        halves = {key: value.half() for key, value in payload["model"].items()}
        content[name] = halves if name == "model" else {"shadow": halves, "num_updates": 1}
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"is .* torch.float16, it should be"):
            checkpoint.load_model(tmp_path / "x.pt", "raw" if name == "model" else "ema")
        with pytest.raises(CheckpointError):
            validate.main([str(tmp_path / "x.pt")])


# The optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizers_own_state_is_loaded_bit_for_bit_and_nothing_else(name, momentum):
    def stepped(steps: int):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            *(torch.nn.Conv2d(n, 8, 3) for n in (3, 8, 8)), torch.nn.BatchNorm2d(8)
        ).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(name, model, lr=0.1, momentum=momentum, nesterov=False, weight_decay=0.1)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return optimizer

    before, after = stepped(3), stepped(0)
    saved = before.state_dict()
    saved["param_groups"] = [
        {**group, "lr": 99.0, "betas": (0.1, 0.1), "fused": None} for group in saved["param_groups"]
    ]
    load_optimizer(after, saved)
    for mine, theirs in zip(after.state.values(), before.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)
        assert all(
            mine[key].stride() == theirs[key].stride() for key in mine if isinstance(mine[key], torch.Tensor)
        )
    assert {group["lr"] for group in after.param_groups} == {0.1} and "lr" in saved["param_groups"][0]
    assert [group["weight_decay"] for group in after.param_groups][:2] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_optimizer_state_that_kernels_do_not_check_is_refused(name):
    model = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(name, model, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    for key, value in saved["state"][0].items():
        wrong = [
            None,
            "x",
            float("nan"),
            -1,
            torch.tensor(-1.0),
            torch.zeros(4, 4),
            torch.zeros(3, 4, dtype=torch.int8),
        ]
        for new in [
            *wrong,
            *([value.double(), value[None]] if isinstance(value, torch.Tensor) else [True, 1.0]),
        ]:
            with pytest.raises(CheckpointError, match=f"parameter 0 has a wrong {key}"):
                load_optimizer(optimizer, changed(saved, ("state", 0, key), new))
        with pytest.raises(CheckpointError, match="parameter 0 has"):
            load_optimizer(optimizer, changed(saved, ("state", 0, key)))
    for state in ({0: saved["state"][0]}, {**saved["state"], 2: saved["state"][1]}, {5: {}, 7: {}}):
        with pytest.raises(CheckpointError, match="state for"):
            load_optimizer(optimizer, {**saved, "state": state})
    with pytest.raises(CheckpointError, match="groups"):
        load_optimizer(optimizer, changed(saved, ("param_groups", 0, "params"), [1]))
    view = torch.zeros(1).expand(3, 4)
    taken = changed(saved, ("state", 0, key), view) if isinstance(value, torch.Tensor) else saved
    load_optimizer(optimizer, taken)
    assert all(
        p.stride() == (4, 1) for p in optimizer.state[model.weight].values() if getattr(p, "ndim", 0) == 2
    )


def test_another_optimizer_starts_without_state_and_says_so(stopped, tmp_path, capsys):
    shutil.copytree(stopped.parent, tmp_path / "run")
    resume = ["--resume", "auto", "--save-dir", str(tmp_path / "run"), "--stop-after", "13"]
    assert train.main([*resume, "--optimizer", "sgd", "--allow-change", "optimizer"]) == 0
    assert "note: the optimizer or its groups differ" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / stopped.name, weights_only=True)["optimizer"]
    assert saved["state"][0].keys() == {"momentum_buffer"}
    assert train.main([*resume, "--stop-after", "14", "--momentum", "0", "--allow-change", "momentum"]) == 0
    assert "note: the optimizer or its groups differ" in capsys.readouterr().out


def test_a_weight_decay_that_is_allowed_to_change_changes(stopped, tmp_path):
    shutil.copytree(stopped.parent, tmp_path / "run")
    arguments = [
        "--save-dir",
        str(tmp_path / "run"),
        "--stop-after",
        "13",
        "--weight-decay",
        "0.5",
        "--allow-change",
        "weight_decay",
    ]
    assert train.main(["--resume", "auto", *arguments]) == 0
    saved = torch.load(tmp_path / "run" / stopped.name, weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.5, 0.0]


# Packed data


@pytest.fixture(scope="module")
def packing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    make_folders(folder / "data", per_class=3, val_per_class=2)
    assert (
        pack_dataset.main(
            ["--data-dir", str(folder / "data"), "--out", str(folder / "out"), "--stored-sides", "16"]
        )
        == 0
    )
    return folder / "out"


def test_every_field_of_a_manifest_deleted_or_made_wrong_is_refused(packing):
    path = packing / "manifest.json"
    whole, accepted, count = json.loads(path.read_text()), [], 0
    try:
        for at, value in places(whole):
            for new in [
                (),
                *((new,) for new in foreign(value)),
                *[(1.5,)] * (type(value) is int),
                ("unknown",),
            ]:
                count += 1
                path.write_text(json.dumps(changed(whole, at, *new)))
                try:
                    packed.open_packed(packing)
                except DataError as error:
                    assert error.exit_code == 3 and error.what.isprintable() and str(packing) in error.what, (
                        at,
                        new,
                    )
                else:
                    accepted.append((at, *new))
        path.write_text(json.dumps(whole | {"new\x1b": 1}))
        with pytest.raises(DataError, match=r"unknown new\\x1b"):
            packed.open_packed(packing)
        path.write_text(json.dumps(whole | {"format": 2, "new": 1}))
        with pytest.raises(DataError, match=r"another version \(with new\)"):
            packed.open_packed(packing)
    finally:
        path.write_text(json.dumps(whole))
    assert not [entry for entry in accepted if not harmless(*entry)] and count > 400


def harmless(at, *new) -> bool:
    """Names and digests may be any text here; other code checks them."""
    text = at[-1] in ("name", "digest", "train", "val", "classes") or at[-2:-1] in (
        ("classes",),
        ("class_names",),
    )
    absent = (at[-1], new) in [
        ("class_names", (None,)),
        ("native_size", (None,)),
        ("skipped", ([],)),
        ("exif", ()),
    ]
    return (
        absent
        or (bool(new) and text and isinstance(new[0], str))
        or (at[0] in ("mean", "std") and new == (1.5,))
    )


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }"
LABELS = [
    np.array([0, 1]),
    np.full(6, 9),
    np.full(6, -1),
    np.full((2, 3), 0),
    np.array(["a"] * 6),
    b"rubbish",
    HEADER,
]


@pytest.mark.parametrize("content", LABELS)
def test_invalid_labels_are_refused(packing, tmp_path, content):
    out = shutil.copytree(packing, tmp_path / "out")
    path = out / "val-labels.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["parts"]["val"] |= {"labels_bytes": path.stat().st_size, "labels_crc32": file_crc32(str(path))}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"val-labels\.npy are"):
        packed.open_packed(out)


NO_IMAGES = pa.array([{"bytes": None, "path": None}] * 6, packed.COLUMNS.field("image").type)
ZEROS = pa.array([0] * 6)


@pytest.mark.parametrize(
    "columns", [{"image": ZEROS, "label": ZEROS}, {"x": ZEROS}, {"image": NO_IMAGES, "label": ZEROS}]
)
def test_a_shard_with_invalid_columns_is_refused(tmp_path, columns):
    table = pa.table(columns)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"it has other columns|images or labels are missing"):
        packed.Shard(str(tmp_path / "x.arrow"), 6)


# What reports read


NO_JSON = [b"5", b"[]", b"{", b"\xff", b"[" * 60_000]


@pytest.mark.parametrize("name, content, reader", [
    *[("config.json", content, runs) for content in NO_JSON],
    *[("env.json", content, reader) for content in NO_JSON for reader in (runs, results)],
    *[("run.json", content, results) for content in NO_JSON],
    ("config.json", b'{"lr": {"y": 1}}', runs), ("env.json", b'{"x": [[]]}', runs),
    ("env.json", b'{"num_val": "9"}', results), ("env.json", b'{"commit": 5}', runs),
    ("run.json", b'{"status": 1}', results), ("run.json", b'{"flags": "x"}', results),
])  # fmt: skip
def test_other_invalid_files_of_a_run_are_named(tmp_path, name, content, reader):
    folder = tmp_path / "a-seed0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        reader.read_run(folder, "a")


def test_invalid_scores_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (tmp_path / "validation").mkdir()
    for content in ("5", "{}", '{"results": [{"top1": {}}], "per_class": [], "confused_pairs": []}'):
        (tmp_path / "validation" / "scores.json").write_text(content)
        with pytest.raises(DataError, match=r"scores\.json"):
            report.main([str(tmp_path), "--out", str(tmp_path / "r.html"), "--no-pictures"])


def test_text_from_files_reaches_the_terminal_escaped(tmp_path, capsys):
    run = tmp_path / "a\x1b[31m"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (run / "config.json").write_text('{"dataset": "\\u001b]0;x\\u0007"}')
    assert errors.run(lambda _: report.main(["--list", str(tmp_path)])) == 0
    assert errors.run(lambda _: print("\x1b[2J\udcff fine\n\r")) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\x07" not in said.out and r"a\x1b[31m" in said.out
    assert r"\x1b[2J\udcff fine" in said.out and "\r" not in said.out
