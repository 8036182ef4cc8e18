import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import headline, parity, records


def test_only_rows_of_the_same_length_and_commit_are_paired(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "project", lambda args, shared: 60.0 + ("--seed=1" in shared))
    monkeypatch.setattr(parity, "plain_loop", lambda args, shared: 61.0)
    arguments = ["--data-dir", "none", "--seeds", "2", "--out", str(tmp_path)]
    assert parity.main([*arguments, "--epochs", "1"]) == 0
    monkeypatch.setattr(parity, "project", lambda args, shared: 70.0 + ("--seed=1" in shared))
    assert parity.main(arguments) == 0
    assert "| 2 | +9.50 [" in capsys.readouterr().out
    monkeypatch.setattr(parity, "project", None)  # nothing is trained again
    assert parity.main(arguments) == 0


@pytest.mark.slow
def test_parity_trains_both_loops_with_each_seed_and_ends_with_their_difference(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k in range(10):
        for part, count in (("train", 14), ("test", 5)):
            folder = tmp_path / "data" / part / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(25 * k, 25 * k + 25, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = ["--data-dir", str(tmp_path / "data"), "--epochs", "1", "--out", str(tmp_path / "out")]
    assert parity.main([*arguments, "--seeds", "2"]) == 0
    rows = records.load(tmp_path / "out", "parity")
    assert [(row["seed"], row["loop"]) for row in rows] == [
        (seed, loop) for seed in (0, 1) for loop in parity.LOOPS
    ]
    assert all(0 <= row["val_top1"] <= 100 and row["cpu_seconds"] > 0 for row in rows)
    assert "| difference, 95 % interval | 2 |" in capsys.readouterr().out


def test_a_headline_run_of_another_commit_is_measured_again(tmp_path, monkeypatch):
    row = records.environment() | {"benchmark": "headline", "seconds": 1.0, "val_top1": 90.0, "epochs": 1}
    rows = [
        row | {"row": "cifar10, seed 0, project", "commit": "another", "load": 0.0},
        row | {"row": "cifar10, seed 1, project", "load": 0.0},
    ]
    (tmp_path / "headline.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    measured = []

    def measure(name, *_):
        measured.append(name)
        return rows[0] | {"row": name}

    monkeypatch.setattr(headline, "measure", measure)
    for seed in ("0", "1"):
        words = ["cifar10", "--data-dir", "unused", "--seed", seed, "--no-plain-loop", "--out", str(tmp_path)]
        assert headline.main(words) == 0
    assert measured == ["cifar10, seed 0, project"]
