"""Counting correct predictions, and the log of a run."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from base.errors import DataError, UsageError
from data_utils import hits
from harness.log import MetricLogger, read_metrics


def test_hits_equal_scikit_learns_on_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, k = int(rng.integers(2, 40)), int(rng.integers(6, 30))
        logits, labels = rng.normal(size=(n, k)), rng.integers(0, k, n)
        ours = hits(torch.tensor(logits), torch.tensor(labels)).float().mean(0)
        theirs = [top_k_accuracy_score(labels, logits, k=top, labels=range(k)) for top in (1, 5)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_ties_go_to_the_lower_class_as_argmax_does():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.integers(0, 3, (500, 8)).astype(np.float32))
    labels = torch.tensor(rng.integers(0, 8, 500))
    expected = torch.from_numpy(np.argmax(logits.numpy(), 1)) == labels
    assert torch.equal(hits(logits, labels)[:, 0], expected)


def test_a_nan_logit_is_never_correct_and_outranks_no_other():
    nan = float("nan")
    logits = torch.tensor([[nan, nan, nan], [nan, 1.0, 0.0], [2.0, 1.0, nan]])
    assert hits(logits, torch.tensor([0, 1, 2]))[:, 0].tolist() == [False, True, False]


def test_with_few_classes_top5_holds_them_all():
    assert hits(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))[:, 1].all()


def test_the_log_is_cut_back_to_the_checkpoint_and_goes_on(tmp_path):
    log = MetricLogger(tmp_path)
    for epoch in (1, 2, 3):
        log.log({"epoch": epoch, "val_top1": float(epoch), "val_loss": float("nan")}, 5 * epoch)
    rows = read_metrics(tmp_path)
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert (
        rows[0]["val_loss"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    )  # JSON has no NaN
    resumed = MetricLogger(tmp_path, rows[:2])
    resumed.log({"epoch": 3, "val_top1": 9.0}, 15)
    assert [r["val_top1"] for r in read_metrics(tmp_path)] == [1.0, 2.0, 9.0]


def test_a_truncated_last_line_is_skipped_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + '\n{"epo')
    (row,) = read_metrics(tmp_path)
    assert row["epoch"] == 1 and row["val_top1"] is None and row["seconds"] is None  # every column is there
    with pytest.raises(DataError, match=r"nowhere.metrics\.jsonl"):
        read_metrics(tmp_path / "nowhere")


@pytest.mark.parametrize("line, words", [
    (b"5", "should be a valid dictionary, not 5"), (b'"x"', "dictionary"), (b"[]", "dictionary"),
    (b"null", "dictionary"), (b"", "unreadable"), (b'{"epo', "unreadable"),
    (b'{"epoch": "\xff"}', "unreadable: 'utf-8'"), (b"[" * 50_000, "unreadable"),
    (b'{"epoch": "x"}', r"epoch should be a valid integer, not 'x'"), (b"{}", "lacks epoch"),
    (b'{"epoch": 0}', "epoch"), (b'{"epoch": true}', "epoch should be a valid integer, not True"),
    (b'{"epoch": 2, "best": 1}', "best"), (b'{"epoch": 2, "image_size": -5}', "image_size"),
    (b'{"epoch": 2, "val_top1": "5"}', "val_top1"), (b'{"epoch": 2, "val_top1": 101}', "val_top1"),
    (b'{"epoch": 2, "seconds": 1e999}', "seconds"), (b'{"epoch": 2, "new": {"deep": []}}', "plain"),
    (b'{"epoch": 2, "best": "\\u001b[31m"}', r"not '\\x1b\[31m'"),
    (b'{"epoch": ' + b"9" * 5000 + b"}", "unreadable"),
])  # fmt: skip
def test_an_invalid_row_is_named(tmp_path, line, words):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n' + line + b'\n{"epoch": 3}\n')
    with pytest.raises(DataError, match=words) as caught:
        read_metrics(tmp_path)
    assert f"{tmp_path / 'metrics.jsonl'} line 2" in caught.value.what and caught.value.exit_code == 3
    assert caught.value.what.isprintable()


def test_a_row_may_hold_more_than_this_code_knows_and_no_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "val_loss": NaN, "train_loss": 1e999, "new": [1, "x"]}\n'
    )
    (row,) = read_metrics(tmp_path)
    assert row["val_loss"] is row["train_loss"] is None and row["new"] == [1, "x"]


ROW = {"epoch": 1, "lr": 0.1, "val_top1": 50.0, "ema_val_top1": None, "better": "raw", "best": True}


def test_tensorboard_gets_every_number_of_a_row(tmp_path):
    log = MetricLogger(tmp_path, tensorboard=True)
    log.log(ROW, 700)
    log.close()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"lr", "val_top1"} <= set(events.Tags()["scalars"])
    (point,) = events.Scalars("val_top1")
    assert (point.step, point.value) == (1, 50.0)


@pytest.mark.parametrize(
    "module, options, flag, install",
    [
        ("wandb", {"wandb": "p"}, "--wandb", "pip install wandb"),
        ("trackio", {"trackio": "p"}, "--trackio", "pip install trackio"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "--tensorboard", "pip install tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named_with_its_install_command(
    tmp_path, monkeypatch, module, options, flag, install
):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UsageError, match=flag) as caught:
        MetricLogger(tmp_path, **options)
    assert caught.value.exit_code == 2 and caught.value.fix == install


@pytest.mark.parametrize("name, key", [("wandb", "id"), ("trackio", "name")])
def test_a_tracker_gets_the_rows_and_one_id_per_directory(name, key, tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda numbers, step: calls.append((step, numbers["val_top1"])),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):  # the second one is a resumed run
        folder.mkdir(exist_ok=True)
        log = MetricLogger(folder, **{name: "p"}, config={"lr": 1})
        log.log(ROW, 700)
        log.close()
    first, second, other = calls[::3]
    assert first == second and first[key] != other[key]
    assert {"project": "p", "config": {"lr": 1}, "resume": "allow"}.items() <= first.items()
    assert calls[1:3] == calls[4:6] == [(700, 50.0), "finish"]
