"""The parts of the training loop: the plan of phases, the training state, one step, one evaluation.

Nothing here reads flags, opens files or prints. Epochs count from 1, as in the log; "step" means
optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.device import Runtime, seed_everything
from base.errors import DivergedError, UsageError
from base.phases import phase_batches, share_epochs
from data_utils import hits, l1_penalty
from models import classifier_of
from optim import clip_gradients, weights_of
from optim.saved import load_optimizer
from optim.schedule import Schedule
from optim.undo import BatchNormBuffers, step_unless

MAX_BAD_STEPS = 10  # in a row; then the run ends
NO_BEST = {"score": -1.0, "epoch": 0, "waited": 0}


# --- the plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs at one image size."""

    first_epoch: int
    last_epoch: int  # inclusive
    image_size: int  # px
    batch_size: int  # global, i.e. summed over ranks
    steps_per_epoch: int
    first_step: int  # steps in all earlier phases
    mix: bool = True  # whether MixUp, CutMix and drop-path are on
    augment: str = "full"  # as --augment writes it
    head_only: bool = False  # whether the classifier alone is trained, see `models.train_mode`

    @property
    def epochs(self) -> int:
        return self.last_epoch - self.first_epoch + 1

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def step_before(self, epoch: int) -> int:
        """Return the number of steps in the run before `epoch`, which must be in this phase."""
        return self.first_step + (epoch - self.first_epoch) * self.steps_per_epoch


def plan(
    epochs: int,
    sizes: Sequence[int],
    num_samples: int,
    batch_size: int,
    *,
    phase_batch_sizes: Sequence[int] | None = None,
    phase_epochs: Sequence[int] | None = None,
    phase_mix: Sequence[bool] | None = None,
    phase_augment: Sequence[str] | None = None,
    freeze_epochs: int = 0,
    world_size: int = 1,
) -> tuple[Phase, ...]:
    """Return the phases of a run: the one plan that the loader, the schedule, the ETA and --dry-run read.

    num_samples:       training images
    batch_size:        global batch size of the first phase, halved from phase to phase
    phase_batch_sizes: global batch size of each phase, instead
    phase_epochs:      relative lengths of the phases, see `base.phases.share_epochs`
    phase_mix:         `Phase.mix` of each phase; True by default
    phase_augment:     `Phase.augment` of each phase; "full" by default
    freeze_epochs:     the first epochs, which are phases of their own with `Phase.head_only`

    Phases without an epoch are left out. Raises UsageError if a phase cannot fill one batch, or the
    ranks cannot share it equally.
    """
    batches = phase_batch_sizes or phase_batches(batch_size, len(sizes))
    mixes, augments = phase_mix or [True] * len(sizes), phase_augment or ["full"] * len(sizes)
    lengths = share_epochs(epochs, phase_epochs, len(sizes))
    phases, first_epoch, first_step = [], 1, 0
    for size, batch, mix, augment, length in zip(sizes, batches, mixes, augments, lengths, strict=True):
        if length == 0:
            continue
        steps = num_samples // batch  # floor: the training loader drops the last partial batch
        if steps == 0:
            what = f"batch size {batch} at {size} px is larger than the {num_samples} training images"
            most = max(1, num_samples)
            fitting = ",".join(str(min(each, most)) for each in batches)
            flag = f"--phase-batch-sizes {fitting}" if phase_batch_sizes else f"--batch-size {most} or less"
            raise UsageError(what, f"use {flag}")
        if batch % world_size:
            what = f"the global batch size {batch} at {size} px is not divisible by {world_size} ranks"
            raise UsageError(what, "choose a --batch-size or --phase-batch-sizes that is")
        frozen = min(length, max(0, freeze_epochs + 1 - first_epoch))
        for part, head_only in ((frozen, True), (length - frozen, False)):
            if part:
                last = first_epoch + part - 1
                phases.append(
                    Phase(first_epoch, last, size, batch, steps, first_step, mix, augment, head_only)
                )
                first_epoch, first_step = first_epoch + part, first_step + part * steps
    return tuple(phases)


def phase_of(phases: Sequence[Phase], epoch: int) -> Phase:
    return next(phase for phase in phases if phase.first_epoch <= epoch <= phase.last_epoch)


# --- the state --------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that must survive a restart, and nothing else.

    The position in the run is `step`, the steps taken so far, and `rows`, one row per finished epoch.
    No RNG state is kept: every random draw is a function of the seed and the position.
    """

    model: nn.Module  # the plain module: DDP and torch.compile wrap it in `StepOptions.forward`
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: object  # ema.EMA or ema.NoEMA
    step: int = 0
    epoch_sums: dict = field(default_factory=dict)  # of the current epoch
    row_sums: dict = field(default_factory=dict)  # since the last row of steps.jsonl, see `log.StepLog`
    bad_in_a_row: int = 0  # non-finite steps, except fp16 overflows that lowered the loss scale
    best: dict = field(default_factory=lambda: dict(NO_BEST))
    rows: list = field(default_factory=list)

    PARTS = ("model", "optimizer", "schedule", "scaler", "ema")
    VALUES = ("step", "epoch_sums", "row_sums", "bad_in_a_row", "best", "rows")

    def __post_init__(self):
        # Listing them takes a quarter of a millisecond.
        self.parameters, self.weights = list(self.model.parameters()), weights_of(self.model)
        self.start_epoch()

    def forget_best(self) -> None:
        self.best = dict(NO_BEST)

    def start_epoch(self) -> None:
        self.epoch_sums = dict(loss=0.0, images=0, seconds=0.0, waited=0.0, bad_steps=0, bad_images=0)

    def count(self, result: StepResult) -> None:
        """Count the bad steps in a row. Raises DivergedError at `MAX_BAD_STEPS`."""
        self.bad_in_a_row = 0 if result.finite or result.overflowed else self.bad_in_a_row + 1
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            scale = f", fp16 scale {result.scale:g}" if self.scaler.is_enabled() else ""
            lr = f"learning rate {self.schedule.last_lr:.2e}{scale}"
            what = f"{self.bad_in_a_row} steps in a row were not finite, up to step {result.step + 1} ({lr})"
            fix = "lower --lr (lr_finder.py suggests one) or try --amp off; the last checkpoint is intact"
            raise DivergedError(what, fix)

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.VALUES}

    def load_state_dict(self, state: dict) -> None:
        """Restore a checkpoint. Raises CheckpointError if its tensors do not fit this run."""
        from base.schemas import check_tensors  # pydantic is slow to import

        check_tensors(state["model"], self.model.state_dict(), "the checkpoint's model")
        if self.ema.module is not None and "shadow" in state["ema"]:
            check_tensors(state["ema"]["shadow"], self.ema.module.state_dict(), "the checkpoint's ema.shadow")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"], classifier_of(self.model).parameters())
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty unless the run used fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.bad_in_a_row, self.rows = state["step"], state["bad_in_a_row"], state["rows"]
        self.row_sums = state.get("row_sums", {})
        # Earlier versions saved other counters: drop unknown ones, start missing ones at their initial value.
        for own, saved in ((self.epoch_sums, state["epoch_sums"]), (self.best, state["best"])):
            own.update({name: saved[name] for name in own if name in saved})

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise DivergedError if weights, BatchNorm statistics, EMA or optimizer state are not finite.

        A step with a finite loss and gradient can still ruin the weights, through the optimizer state
        or faulty memory. Called before every save, so that a ruined state never replaces an intact one.
        """
        optimizer = {
            f"parameter {k}, {name}": value
            for k, state in enumerate(self.optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        average = {} if self.ema.module is None else self.ema.module.state_dict()
        parts = {"weights": self.model.state_dict(), "optimizer state": optimizer, "EMA weights": average}
        for part, tensors in parts.items():
            # Not scalars: they are step counters, which some optimizers keep on the CPU.
            values = {k: v for k, v in tensors.items() if v.is_floating_point() and v.ndim}
            norms = torch._foreach_norm(list(values.values()), math.inf) if values else []
            if not norms or torch.stack(norms).isfinite().all():
                continue
            name = next(name for name, value in values.items() if not value.isfinite().all())
            what = f"the {part} ({name}) are not finite after step {self.step}; nothing was saved"
            raise DivergedError(what, "continue from the last checkpoint with --resume auto, or lower --lr")


# --- one step ---------------------------------------------------------------------------------------


@dataclass
class StepOptions:
    """What a step needs besides the state and a batch; constant within a phase."""

    forward: Callable[[Tensor], Tensor]  # the model, or DDP or torch.compile around it
    mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images, labels -> mixed images, soft targets
    loss: Callable[[Tensor, Tensor], Tensor]  # logits (N, K), targets (N, K) -> scalar
    runtime: Runtime
    buffers: BatchNormBuffers
    seed: int
    clip: tuple[str, float] = ("norm", 1.0)  # (mode, limit) of `optim.clip_gradients`
    accumulate: int = 1  # pieces that a batch is split into
    l1: float = 0.0  # factor of the L1 penalty


class StepResult(NamedTuple):
    """What one step measured."""

    step: int  # steps taken before it
    loss: float  # averaged over all ranks
    norm: float  # of the gradient, before clipping
    bad: float = 0.0  # 1 if loss or norm is not finite: the step moved nothing
    overflowed: float = 0.0  # 1 if this bad step lowered fp16's loss scale: the next one may be finite
    scale: float = 1.0  # of fp16, after the step
    votes: float = 0.0  # share of the ranks that voted, see `train_step`

    @property
    def finite(self) -> bool:
        return not self.bad


class RunningStep:
    """A step that the device may still be taking. `result` waits for it, but not for the steps after it."""

    def __init__(self, step: int, values: dict[str, Tensor]):
        self.step, self.names, self.ready = step, list(values), None
        measured = torch.stack([value.to(values["loss"]) for value in values.values()])
        self.measured = measured.to("cpu", non_blocking=measured.is_cuda)  # into pinned memory
        if measured.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def result(self) -> StepResult:
        if self.ready is not None:
            self.ready.synchronize()
        return StepResult(self.step, **dict(zip(self.names, self.measured.tolist(), strict=True)))


def train_step(
    state: TrainState, options: StepOptions, images: Tensor, labels: Tensor, vote: bool = False
) -> RunningStep:
    """Take one optimizer step on this rank's images (N, 3, H, W) and labels (N,).

    If the loss or the gradient norm is not finite, nothing moves: BatchNorm statistics, weights,
    optimizer state and EMA keep their values. The step still counts in the plan, so a resumed run does
    not repeat the batch. All this is decided on the device: the host reads nothing, and can launch the
    next steps meanwhile. With several ranks, `vote` reaches all of them with the result of this step.
    """
    # Mixing and drop-path draw from this seed, so a step is a function of (state, batch, seed).
    seed_everything(options.seed, state.step, options.runtime.rank)
    images, targets = options.mixer(images, labels)
    step = RunningStep(state.step, update(state, options, images, targets, vote))
    state.schedule.step()
    state.step += 1
    return step


def update(
    state: TrainState, options: StepOptions, images: Tensor, targets: Tensor, vote: bool = False
) -> dict[str, Tensor]:
    """Update the state on mixed images and soft targets (N, K); return the `StepResult` values, each ()."""
    options.buffers.take()
    state.optimizer.zero_grad(set_to_none=True)
    measured = {"loss": backward(state, options, images, targets)}
    # A disabled scaler passes everything through, so fp32, bf16 and fp16 share these lines.
    state.scaler.unscale_(state.optimizer)  # clip real gradients, not scaled ones
    norm = clip_gradients(state.parameters, *options.clip)
    if options.runtime.world_size > 1:
        loss = measured["loss"]
        means = options.buffers.average([loss, torch.full_like(loss, float(vote))], options.runtime)
        measured = dict(zip(("loss", "votes"), means, strict=True))
    zero = (measured["loss"] + norm) * 0.0  # NaN unless both are finite
    finite, bad = zero == 0.0, zero.nan_to_num(nan=1.0)
    options.buffers.restore_unless(finite)
    step_unless(bad, state.optimizer)
    state.ema.update(finite)
    return measured | {"norm": norm, "bad": bad} | update_scale(state.scaler, measured["loss"], finite)


def backward(state: TrainState, options: StepOptions, images: Tensor, targets: Tensor) -> Tensor:
    """Accumulate the gradients of the batch's mean loss in `options.accumulate` pieces; return that loss."""
    losses, pieces = [], min(options.accumulate, len(images))
    parts = zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
    for k, (part, part_targets) in enumerate(parts, 1):
        last = k == pieces
        no_sync = getattr(options.forward, "no_sync", nullcontext)  # DDP: exchange gradients once
        with nullcontext() if last else no_sync():
            with options.runtime.autocast():
                logits = options.forward(part)
            # Outside autocast, so in float32. Weighted, because the last pieces may be one image smaller.
            loss = options.loss(logits, part_targets)
            loss = loss * (len(part) / len(images)) if pieces > 1 else loss
            if last and options.l1:
                loss = loss + options.l1 * l1_penalty(state.weights)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def smallest_piece(images: int, accumulate: int) -> int:
    """Return the number of images in the smallest piece that `backward` cuts from a batch of `images`."""
    return max(1, images // accumulate)


def update_scale(scaler: torch.amp.GradScaler, loss: Tensor, finite: Tensor) -> dict[str, Tensor]:
    """Update the fp16 loss scale; return whether a bad step lowered it, and the scale. Nothing without fp16.

    Lowering cannot help if the loss itself is not finite, or at a scale of 1, where the gradients overflow
    without any scaling. So, from the initial 65536, at most 16 steps in a row are excused as overflows.
    """
    if not scaler.is_enabled():
        return {}
    one = torch.ones_like(loss)
    before, growth = scaler.scale(one), scaler._growth_tracker.clone()  # finite steps since it last changed
    scaler.update()
    after = scaler.scale(one)
    overflowed = ~finite & loss.isfinite() & (after >= 1.0) & (after < before)
    scaler.update(torch.where(finite | overflowed, after, before.clamp(min=1.0)))
    scaler._growth_tracker.copy_(torch.where(finite | overflowed, scaler._growth_tracker, growth))
    return {"overflowed": overflowed, "scale": scaler.scale(one)}


# --- one evaluation ---------------------------------------------------------------------------------


class EvalResult(NamedTuple):
    loss: float  # cross-entropy without label smoothing
    top1: float  # percent
    top5: float
    num_samples: int


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    after_batch: Callable[[], None] = lambda: None,
    *,
    flip: bool = False,
) -> dict[str, EvalResult]:
    """Score every model on every sample of `batches`, over all ranks, in one pass over the data.

    models:  {name: model}, which are left in eval mode
    batches: this rank's images (N, 3, H, W) and labels (N,), on the device; N may be 0
    flip:    score each image together with its mirror image, see `flipped_logits`

    Every sample counts once: sums are divided at the end. A mean of batch means, or of rank means,
    would give the samples of a short last batch too much weight.
    """
    for model in models.values():
        model.eval()
    # Loss, top-1, top-5. float64 counts exactly (MPS has none: float32 does up to 2**24).
    dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
    sums, samples = {name: torch.zeros(3, device=runtime.device, dtype=dtype) for name in models}, 0
    for images, labels in batches:
        named = models.items() if len(labels) else ()  # a rank's part of the last batch may be empty
        for name, model in named:
            logits = logits_of(model, images, runtime)
            if flip:
                logits = flipped_logits(model, images, logits, runtime)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[name] += torch.cat([loss[None], hits(logits, labels).sum(0)]).to(dtype)
        samples += len(labels)
        after_batch()
    counts = torch.full((len(models), 1), samples, device=runtime.device, dtype=dtype)
    totals = torch.cat([torch.stack(list(sums.values())), counts], 1)
    totals = runtime.sum_over_ranks(totals).tolist()  # the only host read of this function
    return {name: _result(*total) for name, total in zip(models, totals, strict=True)}


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """images (N, 3, H, W) -> (N, K) float32, computed in the runtime's precision."""
    with runtime.autocast():
        return model(images).float()


def flipped_logits(model: nn.Module, images: Tensor, logits: Tensor, runtime: Runtime) -> Tensor:
    """Test-time augmentation: the mean of an image's `logits` and those of its mirror image, (N, K).

    The mean of logits, not of probabilities, as in FFCV's recipe: https://github.com/libffcv/ffcv-imagenet
    """
    return (logits + logits_of(model, images.flip(3), runtime)) / 2


def _result(loss: float, top1: float, top5: float, samples: float) -> EvalResult:
    n = samples or math.nan  # all images may be bad and left out
    return EvalResult(loss / n, 100 * top1 / n, 100 * top5 / n, int(samples))
