"""benchmarks.step: the loops train as described and take turns, and the rows hold what was measured."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from base.device import Runtime
from benchmarks import step, step_loops
from models import build_model

CPU = Runtime(torch.device("cpu"))
TINY = step_loops.Setting("resnet_tiny", 16, 8, CPU)


@pytest.mark.parametrize("name", [name for name in step_loops.LOOPS if name != "timm"])
def test_every_loop_takes_optimizer_steps(name, monkeypatch):
    stepped = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: stepped.append(len(self.param_groups[0]["params"]))
    )
    loop = step_loops.LOOPS[name](TINY)
    loop()
    loop()
    count = sum(p.ndim > 1 for p in build_model("resnet_tiny", num_classes=1000).parameters())
    assert stepped == [count, count]


def test_without_its_guard_the_step_computes_the_same(monkeypatch):
    states = []
    built = step_loops.built
    monkeypatch.setattr(step_loops, "built", lambda *args: states.append(built(*args)) or states[-1])
    for make in (step_loops.project, step_loops.no_guard):
        loop = make(TINY)
        for _ in range(3):
            loop()
    (one, _), (two, _) = states
    assert one.step == two.step == 3
    for a, b in ((one.model, two.model), (one.ema.module, two.ema.module)):
        assert all(
            torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )


def test_a_variant_changes_one_choice():
    found = step_loops.variants(replace(TINY, runtime=Runtime(torch.device("cpu"), torch.bfloat16)))
    assert list(found) == ["fp32", "nchw", "compile", "blurpool", "batch 4", "batch 16", "batch 32"]
    assert found["fp32"].runtime == CPU and found["compile"].config().compile
    assert found["blurpool"].config().use_blurpool and found["batch 32"].config().batch_size == 32


def test_the_loops_take_turns_and_every_other_round_goes_backwards():
    calls = []
    loops = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = step.in_turns(loops, rounds=4, steps=2, device=CPU.device)
    assert "".join(calls) == "aabbccccbbaaaabbccccbbaa"
    assert [len(times) for times in seconds.values()] == [4, 4, 4]


def test_the_command_writes_rows_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(step_loops.LOOPS, "timm", absent)
    file = tmp_path / "new" / "step.json"
    arguments = "--arch resnet_tiny --sizes 16 24 --batch-sizes 8 4 --rounds 2 --device cpu --amp off --json"
    assert step.main([*arguments.split(), str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(r["size"], r["loop"]) for r in rows] == [
        (size, loop) for size in (16, 24) for loop in step_loops.LOOPS if loop != "timm"
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["milliseconds"])
        assert {"commit", "command", "device", "threads", "memory_mib"} <= row.keys()
    ratio = rows[1]["milliseconds"] / rows[0]["milliseconds"]
    assert rows[1]["times_bare"] == pytest.approx(ratio) and "times_bare" not in rows[0]
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "timm: not available" in capsys.readouterr().out


def test_an_unavailable_variant_is_skipped_and_rows_are_written_one_by_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_loops, "LOOPS", {"bare": step_loops.bare, "timm": absent})
    monkeypatch.setitem(sys.modules, "antialiased_cnns", None)
    changed = {
        "nchw": replace(TINY, memory_format=torch.contiguous_format),
        "blurpool": replace(TINY, arch="resnet18", options=("--use-blurpool",)),
        "batch 4": replace(TINY, batch_size=4),
    }
    monkeypatch.setattr(step_loops, "variants", lambda setting: changed)
    file = tmp_path / "step.json"
    written = []
    write = step.files.write_json

    def write_and_count(path, rows):
        write(path, rows)
        written.append(len(json.loads(file.read_text())))

    monkeypatch.setattr(step.files, "write_json", write_and_count)
    arguments = (
        "--arch resnet_tiny --sizes 16 --batch-sizes 8 --rounds 1 --device cpu --amp off --variants --json"
    )
    assert step.main([*arguments.split(), str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows] == ["", "nchw", "batch 4"] and written == [1, 2, 3]
    assert rows[2]["base_batch_size"] == 8 and rows[2]["times_faster_than_default"] > 0
    assert (
        "blurpool: not available (--use-blurpool needs the antialiased-cnns package)"
        in capsys.readouterr().out
    )
    assert file.with_suffix(".png").stat().st_size > 1000


def absent(setting):
    raise ImportError("No module named 'timm'")


def test_a_wrong_number_of_batch_sizes_is_refused_before_any_import():
    started = time.perf_counter()
    with pytest.raises(step.UsageError, match="1 --batch-sizes for 2 --sizes"):
        step.main(["--sizes", "16", "24", "--batch-sizes", "8"])
    assert time.perf_counter() - started < 1
