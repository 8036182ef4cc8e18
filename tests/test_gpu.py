"""What only a GPU can show: `make test-gpu`. Skipped without one."""

import gc
import math
from contextlib import contextmanager

import pytest
import torch
from inprocess import tiny_run
from runs import digest
from test_options import fitted

import dataloader
import loop
from base.device import Runtime, seed_everything
from base.errors import ResourceError
from base.flags import parse_augment
from dataloader import train_loader
from harness import preflight
from harness.log import MetricLogger
from models import build_model
from sources.layouts import open_dataset
from train_utils import evaluate, train_step

pytestmark = pytest.mark.gpu
GPU = ["--device", "cuda"]
LEARNS = [
    *(*GPU, "--resize-schedule", "16,16", "--phase-batch-sizes", "8,8", "--epochs", "6", "--augment", "flip"),
    *("--lr", "3e-3", "--mixup-alpha", "0", "--cutmix-alpha", "0"),
]


def tensors(state) -> list[torch.Tensor]:
    return [value.clone() for value in state.model.state_dict().values()]


def moved(state) -> list[torch.Tensor]:
    """Return what only a finite step moves: not BatchNorm's counters, which count every step."""
    values = [*state.model.state_dict().values(), *state.ema.module.state_dict().values()]
    return [value.clone() for value in values if value.is_floating_point()]


def batch_of(run, size: int = 16):
    torch.manual_seed(0)
    images = torch.randn(8, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    return images, torch.arange(8, device="cuda")


def losses(run) -> list[float]:
    """Return the loss of every step of the run, without any evaluation."""
    steps = []
    run.state.model.train()
    for phase in run.phases:
        loader, how = loop.start_phase(run, phase)
        for _ in range(phase.epochs):
            steps += [train_step(run.state, how, images, labels) for images, labels in loader]
    return [step.result().loss for step in steps]


@contextmanager
def no_waiting():
    """Raise an error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def memory_limited_to(mib: float):
    """Let this process take `mib` more than it has: earlier tests may have left something."""
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + mib * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# --- nothing waits ---


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("options", [
    [], ["--accumulate", "2"], ["--optimizer", "sgd"], ["--optimizer", "lamb", "--l1", "1e-5"],
    ["--clip-mode", "value", "--optimizer", "rmsprop"],
])  # fmt: skip
def test_steps_with_prefetch_never_wait(tmp_path, amp, options):
    plan = ["--resize-schedule", "24", "--phase-batch-sizes", "4", "--epochs", "1", "--num-workers", "1"]
    run = tiny_run(tmp_path, *GPU, *plan, "--amp", amp, "--ema-decay", "0.9", *options)
    loader, how = loop.start_phase(run, run.phases[0])
    run.state.model.train()
    batches = iter(loader)
    steps = [train_step(run.state, how, *next(batches)) for _ in range(4)]  # the first ones make constants
    with no_waiting():
        steps += [train_step(run.state, how, *next(batches)) for _ in range(4)]
    assert all(math.isfinite(step.result().loss) for step in steps)


def test_evaluation_waits_only_at_its_end(tmp_path):
    run = tiny_run(tmp_path, *GPU, "--amp", "bf16")
    images, labels = batch_of(run)

    def batches():
        yield images, labels
        with no_waiting():
            for _ in range(4):
                yield images, labels

    models = {"val": run.state.model, "ema_val": run.state.ema.module}
    scores = evaluate(models, batches(), run.runtime)
    once = evaluate(models, [(images, labels)], run.runtime)
    for name, score in scores.items():
        assert score.num_samples == 40
        assert score.loss == pytest.approx(once[name].loss, rel=1e-3)


# --- prefetch ---


def test_a_copy_overlaps_the_step_before_it(photos):
    device = torch.device("cuda", torch.cuda.current_device())
    data = open_dataset("imagenet", photos)
    batches = iter(train_loader(data, image_size=48, batch_size=8, augment=(), runtime=Runtime(device)))
    for _ in range(3):  # the first ones allocate memory
        next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # a step of about half a second
    end = torch.cuda.Event()
    end.record()
    next(batches)
    dataloader._copy_stream(device).synchronize()
    assert not end.query()


def test_a_step_waits_for_its_own_copy(photos, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    data = open_dataset("imagenet", photos)
    options = {"image_size": 48, "batch_size": 8, "augment": ()}
    loader = train_loader(data, **options, runtime=Runtime(device))
    real = loader._to_device
    monkeypatch.setattr(loader, "_to_device", lambda batch: torch.cuda._sleep(10**8) or real(batch))
    found = [images.sum() for images, _ in loader]
    wanted = [images.sum().item() for images, _ in train_loader(data, **options)]
    assert torch.stack(found).tolist() == pytest.approx(wanted, rel=1e-4)


def test_prefetched_batches_equal_those_of_the_cpu(photos):
    data = open_dataset("imagenet", photos)
    options = {
        "image_size": 48,
        "batch_size": 8,
        "augment": parse_augment("full"),
        "seed": 5,
        "num_workers": 2,
    }
    busy = torch.randn(4096, 4096, device="cuda")
    seen = []
    for images, labels in train_loader(data, **options, runtime=Runtime(torch.device("cuda"))):
        for _ in range(20):  # a step still reads its batch when the next one arrives
            busy = (busy @ busy).clamp_(-1, 1)
        seen.append((images * 1, labels * 1))
    wanted = list(train_loader(data, **options))
    assert len(seen) == len(wanted) == 9
    for (images, labels), (right, names) in zip(seen, wanted, strict=True):
        torch.testing.assert_close(images.cpu(), right, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), names)
        assert images.is_contiguous(memory_format=torch.channels_last)


# --- compilation and CUDA graphs ---


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_drop_path_under_compile_and_graphs_reads_its_seed_anew(mode):
    model = build_model("resnet_tiny", num_classes=10, drop_path_rate=0.5).cuda().train()
    for name, value in model.named_parameters():
        if "bn" in name and name.endswith("weight"):
            value.data.fill_(1.0)  # a branch that starts as zero would hide that it is dropped
    torch._dynamo.reset()
    forward = torch.compile(model, dynamic=False, mode=mode)
    images = torch.randn(16, 3, 32, 32, device="cuda")

    def gradient_after(seed: int) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        seed_everything(seed)
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        forward(images).float().square().mean().backward()
        return model.conv1.weight.grad.clone()

    # With graphs, the first call runs without one, the second records it, the others replay it. All must
    # draw the same: a resumed run takes as its first step one that the undisturbed run replayed.
    seeds = [1, 1, 2, 1, 2]
    found = [gradient_after(seed) for seed in seeds]
    for seed, gradient in zip(seeds, found, strict=True):
        torch.testing.assert_close(gradient, found[seeds.index(seed)], rtol=1e-4, atol=1e-6)
    assert (found[3] - found[2]).abs().max() > 100 * (found[3] - found[0]).abs().max()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_graphs_follow_the_eager_trace_at_three_sizes(tmp_path, amp, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    options = [*GPU, "--resize-schedule", "16,24,32", "--amp", amp]
    options += ["--drop-path-rate", "0"]  # compiled code draws other numbers
    run = tiny_run(tmp_path, *options, "--cuda-graphs")
    preflight.check_resources(run)
    graphs = losses(run)
    # Three sizes of five steps and two passes; the first step at a size runs without a graph.
    assert len(graphs) == 15 and len(replays) >= 3 * 4 * 2
    assert graphs == pytest.approx(losses(tiny_run(tmp_path, *options)), rel=1e-2)


def test_a_resumed_run_with_cuda_graphs_is_the_one_never_stopped(tmp_path):
    arguments = [*LEARNS, "--deterministic", "--amp", "bf16", "--drop-path-rate", "0.3", "--cuda-graphs"]
    fitted(arguments, tmp_path / "whole")
    fitted([*arguments, "--stop-after", "13"], tmp_path / "halves")
    fitted(arguments, tmp_path / "halves", resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "halves")


# --- training ---


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_every_precision_trains(tmp_path, amp):
    rows = fitted([*LEARNS, "--amp", amp], tmp_path).state.rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and sum(
        row["bad_steps"] for row in rows
    ) <= 2 + 16 * (amp == "fp16")


def test_an_overflow_in_fp16_lowers_the_scale_and_changes_no_weight(tmp_path):
    run = tiny_run(tmp_path, *LEARNS, "--amp", "fp16")
    run.state.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    how, (images, labels) = loop.start_phase(run, run.phases[0])[1], batch_of(run)
    run.state.model.train()
    before, scale = moved(run.state), run.state.scaler.get_scale()
    result = train_step(run.state, how, images, labels).result()
    assert not result.finite and result.overflowed  # a lower scale cures it
    assert run.state.scaler.get_scale() == scale / 2 and run.state.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, moved(run.state), strict=True))
    while run.state.scaler.get_scale() > 2.0**10:
        run.state.scaler.update(run.state.scaler.get_scale() / 2)
    train_step(run.state, how, images, labels)
    assert not all(torch.equal(a, b) for a, b in zip(before, moved(run.state), strict=True))


def test_a_step_that_is_not_finite_moves_nothing(tmp_path):
    run = tiny_run(tmp_path, *LEARNS, "--amp", "bf16")
    how, (images, labels) = loop.start_phase(run, run.phases[0])[1], batch_of(run)
    run.state.model.train()
    train_step(run.state, how, images, labels)
    before = moved(run.state)
    images[0, 0, 0, 0] = float("nan")
    result = train_step(run.state, how, images, labels).result()
    assert not result.finite and not result.overflowed and run.state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, moved(run.state), strict=True))


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_deterministic_runs_and_resumed_ones_share_their_bits(tmp_path, amp):
    arguments = [*LEARNS, "--deterministic", "--amp", amp, "--mixup-alpha", "0.2", "--ema-decay", "0.9"]
    for name in ("one", "two"):
        fitted(arguments, tmp_path / name)
    fitted([*arguments, "--stop-after", "13"], tmp_path / "halves")
    fitted(arguments, tmp_path / "halves", resume=True)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == digest(tmp_path / "halves")


# --- memory ---


def test_a_later_phase_that_does_not_fit_is_found_at_the_start(tmp_path):
    sizes = ["--resize-schedule", "16,512", "--phase-batch-sizes", "32,32", "--epochs", "2", "--amp", "off"]
    sizes += ["--eval-size", "16"]  # scoring at 512 px does not fit either, and cannot be split
    run = tiny_run(tmp_path, *GPU, *sizes)
    before = tensors(run.state)
    with (
        memory_limited_to(400),
        pytest.raises(ResourceError, match=r"phase 2: 512 px, batch size 32.*MiB free") as caught,
    ):
        preflight.check_resources(run)
    assert "--accumulate" in caught.value.fix and "--phase-batch-sizes 32," in caught.value.fix
    pieces = int(caught.value.fix.split("--accumulate ")[1].split(",")[0])
    fitting = tiny_run(tmp_path, *GPU, *sizes, "--accumulate", str(pieces))
    with memory_limited_to(400):
        preflight.check_resources(fitting)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(fitting.state), strict=True))


def test_memory_that_runs_out_in_training_is_named(tmp_path):
    run = tiny_run(tmp_path, *GPU, "--resize-schedule", "512", "--phase-batch-sizes", "32", "--amp", "off")
    how = loop.start_phase(run, run.phases[0])[1]
    with (
        memory_limited_to(100),
        pytest.raises(ResourceError, match="512 px, batch size 32"),
        preflight.explain_out_of_memory(run),
    ):
        train_step(
            run.state,
            how,
            torch.randn(32, 3, 512, 512, device="cuda"),
            torch.zeros(32, dtype=torch.long).cuda(),
        )


def test_the_memory_check_changes_no_bit_of_the_run(tmp_path):
    arguments = [*LEARNS, "--deterministic", "--amp", "bf16"]
    fitted(arguments, tmp_path / "plain")
    (tmp_path / "looked").mkdir()
    looked = tiny_run(tmp_path / "looked", *arguments)
    try:
        before, generator = tensors(looked.state), torch.cuda.get_rng_state()
        preflight.check_step_memory(looked)
        assert torch.equal(generator, torch.cuda.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(looked.state), strict=True))
        assert all(p.grad is None for p in looked.state.model.parameters())
        loop.fit(looked, MetricLogger(tmp_path / "looked", looked.state.rows))
    finally:
        torch.use_deterministic_algorithms(False)
    assert digest(tmp_path / "looked") == digest(tmp_path / "plain")
