"""benchmarks.bitflips: each fork differs from the run in one bit, and the tables count the outcomes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from inprocess import tiny_run
from runs import ROOT

from benchmarks import bitflips


@pytest.mark.parametrize("bit", [0, 22, 23, 30, 31])
def test_a_flip_is_of_exactly_one_bit_and_found_by_xor(bit):
    tensor = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )
    words = tensor.permute(0, 2, 3, 1).reshape(-1).view(torch.int32).clone()  # in memory order
    before, after = bitflips.flip(tensor, 17, bit)
    changed = words ^ tensor.permute(0, 2, 3, 1).reshape(-1).view(torch.int32)
    assert changed.nonzero().tolist() == [[17]] and changed[17].item() & 0xFFFFFFFF == 1 << bit
    assert bitflips.flip(tensor, 17, bit) == (pytest.approx(after, nan_ok=True), before)


@pytest.mark.parametrize("kind", bitflips.KINDS)
def test_every_kind_of_memory_is_flipped_in_one_place_and_nowhere_else(tmp_path, kind):
    run = tiny_run(tmp_path)
    for p in run.state.model.parameters():
        p.grad = torch.ones_like(p)
    run.state.optimizer.step()
    kinds = {name: bitflips.memory(run, name) for name in bitflips.KINDS}
    before = {name: [t.detach().clone() for t in tensors] for name, tensors in kinds.items()}
    assert all(tensors for tensors in kinds.values())
    bitflips.flip_one(run, {"kind": kind, "where": 0.999, "bit": 20})
    for name, tensors in kinds.items():
        changed = sum((a != b).sum().item() for a, b in zip(tensors, before[name], strict=True))
        assert changed == (name == kind), name


# In a process of its own, because a fork copies the locks of all threads but only one thread.
SCRIPT = """
import sys
from pathlib import Path
from benchmarks import bitflips
bitflips.RUN += ["--subset", "--subset-size", "160", "--epochs", "2"]
if "nothing" in sys.argv:
    bitflips.flip_one = lambda run, point: {}
sys.exit(bitflips.main(["--points", "3", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("what", ["nothing", "a bit"])
def test_a_fork_differs_from_the_run_in_its_bit_only(tmp_path, what):
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, what], env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["bitflips.json"]
    result = json.loads((tmp_path / "bitflips.json").read_text())
    assert len(result["points"]) == 3 and "3 flips" in done.stdout
    if what == "nothing":
        assert {point["outcome"] for point in result["points"]} == {"same bits"}
    assert bitflips.tables(result) + "\n" == done.stdout


def test_outcomes():
    undisturbed = {"error": "", "bad_steps": 0, "digest": "a", "score": 90.0}

    def of(**changes):
        return bitflips.outcome({**undisturbed, **changes}, undisturbed)

    assert of() == "same bits" and of(digest="b") == "same score"
    assert of(error="DivergedError", score=None) == of(bad_steps=1) == "noticed"
    assert of(digest="b", score=89.0) == of(digest="b", score=91.0) == "within 1 point"
    assert of(digest="b", score=88.9) == "worse" and of(digest="b", score=91.1) == "better"
    assert math.isclose(bitflips.WORSE, 1) and "within 1 point" in bitflips.OUTCOMES
