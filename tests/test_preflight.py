"""Lacking resources are refused or warned about at the start, without any effect on training."""

import copy
import dataclasses
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from inprocess import tiny_run

import loop
from base import errors
from base.device import memory_for
from base.errors import ResourceError
from harness import preflight
from models import classifier_of
from optim.undo import step_unless

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path)


def grab(images: int, limit: int) -> None:
    if images > limit:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("optimizer, slots", [
    ("adamw", 2), ("sgd", 1), ("lamb", 2), ("rmsprop", 2), ("rmsprop --momentum 0", 1),
    ("sgd --momentum 0", 0), ("muon", 1.05),  # AdamW, with two, trains the rest
])  # fmt: skip
def test_the_checkpoint_size_is_known_before_the_first_step(tmp_path, optimizer, slots):
    run = tiny_run(tmp_path, "--optimizer", *optimizer.split())
    predicted = preflight.checkpoint_bytes(run)
    weights = sum(p.numel() for p in run.state.model.parameters()) * 4
    assert predicted == pytest.approx((2 + slots) * weights, rel=0.01)
    before = preflight.new_optimizer_bytes(run)
    taken = step_on_zeros(run, run.state.model)
    assert before == pytest.approx(taken, rel=1e-3)  # without its counters
    assert preflight.new_optimizer_bytes(run) == 0
    step_unless(torch.zeros(()), run.state.optimizer)
    kept = getattr(run.state.optimizer, "kept", None)
    assert preflight.copies_bytes(run) == (preflight.tensor_bytes(kept.copies) if kept else 0)


def step_on_zeros(run, module) -> int:
    """Take a step that trains `module` alone; return the size of the optimizer's state after it."""
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    run.state.optimizer.step()
    return sum(preflight.tensor_bytes(state.values()) for state in run.state.optimizer.state.values())


def test_a_run_resumed_in_its_freeze_epochs_counts_the_state_that_all_layers_will_have(run):
    size, new = preflight.checkpoint_bytes(run), preflight.new_optimizer_bytes(run)
    taken = step_on_zeros(run, classifier_of(run.state.model))
    assert 0 < taken < new / 2 and preflight.checkpoint_bytes(run) == size
    assert preflight.new_optimizer_bytes(run) == pytest.approx(new - taken, rel=1e-2)


def test_a_disk_without_room_for_all_checkpoints_is_refused_before_the_first_step(run, tmp_path, monkeypatch):
    size = preflight.checkpoint_bytes(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 5 * size - 1))
    with pytest.raises(ResourceError, match=r"MiB free.*need") as caught:
        preflight.check_resources(run)
    assert str(tmp_path) in caught.value.what and caught.value.exit_code == 6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 5 * size))
    preflight.check_resources(run)


def test_a_resumed_run_needs_room_for_the_checkpoints_it_does_not_have_yet(run, tmp_path, monkeypatch):
    size = preflight.checkpoint_bytes(run)
    former = [tmp_path / f"{kind}_x.pt" for kind in ("last", "best", "prev_last")]
    former[0].write_bytes(bytes(size))
    former[1].hardlink_to(former[0])  # one file with two names
    former[2].write_bytes(bytes(size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 3 * size))
    preflight.check_disk(run, former)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 3 * size - 1))
    with pytest.raises(ResourceError):
        preflight.check_disk(run, former)


def test_the_trial_step_leaves_no_trace(run):
    before, grown = copy.deepcopy(run.state.state_dict()), torch.random.get_rng_state()
    _, options = loop.start_phase(run, run.phases[-1])
    preflight.try_step(run, options, run.phases[-1], 8, options.forward)
    assert torch.equal(torch.random.get_rng_state(), grown)
    assert all(p.grad is None for p in run.state.model.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(before["model"].values(), run.state.model.state_dict().values(), strict=True)
    )
    assert before["optimizer"] == run.state.optimizer.state_dict()


@pytest.mark.parametrize("limit, fits", [(64, 64), (63, 32), (20, 16), (1, 1), (0, 0)])
def test_the_largest_batch_that_fits_is_found_by_halving(limit, fits):
    assert preflight.largest_fitting(64, lambda images: grab(images, limit)) == fits


def test_another_error_of_the_trial_is_not_taken_for_a_lack_of_memory():
    def broken(images):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        preflight.largest_fitting(4, broken)


SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at x.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("[enforce fail at x.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    MemoryError(),
]


def fail(error: Exception):
    raise error


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:40])
def test_every_message_of_memory_running_out_is_exit_code_6(run, error, monkeypatch, capsys):
    assert preflight.largest_fitting(4, lambda images: images > 1 and fail(error)) == 1
    for named in (preflight.explain_out_of_memory(run), memory_for("x", "y", torch.device("cpu"))):
        with pytest.raises(ResourceError, match="out of memory"), named:
            fail(error)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    assert errors.run(lambda argv: fail(error)) == 6  # anywhere else
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and "fix: " in said


def test_code_that_cannot_be_compiled_is_exit_code_6(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    reason = RuntimeError("no compiler found\nand much more")
    failed = torch._dynamo.exc.BackendCompilerFailed(lambda: None, reason, None)
    assert errors.run(lambda argv: fail(failed)) == 6
    said = capsys.readouterr().err
    assert said.startswith(
        "error: torch.compile failed: RuntimeError: no compiler found\nfix: use --no-compile"
    )


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(RuntimeError, match="shape"):
        errors.run(lambda argv: fail(RuntimeError("shape mismatch")))


@pytest.mark.parametrize("synchronized", [False, True])
def test_steps_are_not_tried_alone_where_they_wait_for_other_ranks(synchronized, run, monkeypatch):
    tried = []
    if synchronized:
        run.options.buffers.norms.append(torch.nn.SyncBatchNorm(3))
    run.runtime = dataclasses.replace(run.runtime, device=torch.device("cuda"))
    for name in ("check_disk", "check_step_memory", "check_eval_memory"):
        monkeypatch.setattr(preflight, name, lambda run, *former, name=name: tried.append(name))
    preflight.check_resources(run)
    assert ("check_step_memory" in tried) != synchronized and "check_eval_memory" in tried


def test_memory_reserved_for_later_may_be_what_does_not_fit(run, monkeypatch):
    monkeypatch.setattr(preflight, "ballast_bytes", lambda run, phase: 1 << 62)
    with pytest.raises(ResourceError, match="out of memory in phase 3") as caught:
        preflight.check_step_memory(run)
    assert "not even one image fits" in caught.value.fix


def test_too_large_a_phase_is_named_with_what_fits(run, monkeypatch):
    monkeypatch.setattr(preflight, "try_step", lambda run, options, phase, images, forward: grab(images, 3))
    with pytest.raises(ResourceError) as caught:
        preflight.check_step_memory(run)
    assert "phase 3: 24 px, batch size 8, 8 images at once" in caught.value.what
    assert "--accumulate 4," in caught.value.fix and "--phase-batch-sizes 8,8,2" in caught.value.fix
    run.metadata["config"]["cuda_graphs"] = True  # which cannot accumulate
    with pytest.raises(ResourceError) as caught:
        preflight.check_step_memory(run)
    assert "--accumulate 4 --no-cuda-graphs," in caught.value.fix


@pytest.mark.parametrize("plan, sizes", [
    # One size that is two phases, and three sizes of which one gets no epoch.
    ("--resize-schedule 24 --phase-batch-sizes 8 --init-from x.pt --freeze-epochs 1", "2"),
    ("--epochs 2 --phase-epochs 1,1,2", "8,8,2"),
])  # fmt: skip
def test_the_batch_sizes_that_fit_have_an_entry_for_each_size(tmp_path, plan, sizes, monkeypatch):
    run = tiny_run(tmp_path, *plan.split())
    assert len(run.phases) == 2
    monkeypatch.setattr(preflight, "try_step", lambda run, options, phase, images, forward: grab(images, 3))
    with pytest.raises(ResourceError) as caught:
        preflight.check_step_memory(run)
    assert caught.value.fix.endswith(f"--phase-batch-sizes {sizes}")


def test_memory_that_runs_out_during_training_is_a_resource_error(run):
    run.state.step = run.phases[1].first_step
    with (
        pytest.raises(ResourceError, match="16 px, batch size 8") as caught,
        preflight.explain_out_of_memory(run),
    ):
        grab(1, 0)
    assert "--resume auto" in caught.value.fix and "--accumulate 2 " in caught.value.fix
    run.options.accumulate, run.metadata["config"]["cuda_graphs"] = 4, True
    with pytest.raises(ResourceError) as caught, preflight.explain_out_of_memory(run):
        grab(1, 0)
    assert "--accumulate 8 --no-cuda-graphs " in caught.value.fix
    with pytest.raises(RuntimeError, match="other"), preflight.explain_out_of_memory(run):
        raise RuntimeError("other")
