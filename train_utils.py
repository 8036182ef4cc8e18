"""The training loop and what it is made of: phases, the state, one step, one epoch, evaluation.

Nothing here reads flags, opens files or prints; `train.py` decides those and passes values in.
Epochs are 1-based everywhere, as in the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.device import Runtime, seed_everything
from base.errors import DivergedError, UsageError
from base.phases import phase_batches, share_epochs
from data_utils import hits
from optim import clip_gradients, load_optimizer


@dataclass(frozen=True)
class Phase:
    """A run of epochs at one image size; both ends are inclusive."""

    first_epoch: int
    last_epoch: int
    image_size: int
    batch_size: int  # global, i.e. summed over ranks
    steps_per_epoch: int
    first_step: int  # optimizer steps of all phases before this one
    mix: bool = True  # MixUp, CutMix and drop-path

    @property
    def epochs(self) -> int:
        return self.last_epoch - self.first_epoch + 1

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def step_before(self, epoch: int) -> int:
        """Optimizer steps of the run before `epoch` of this phase begins."""
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
    world_size: int = 1,
) -> tuple[Phase, ...]:
    """The one plan of a run: the loader, the schedule, the ETA and --dry-run all read it.

    `batch_size` is the first phase's, halved at every size step unless `phase_batch_sizes` says
    otherwise. Raises UsageError where a phase cannot fill a batch.
    """
    batches = phase_batch_sizes or phase_batches(batch_size, len(sizes))
    mixes = phase_mix or [True] * len(sizes)
    phases, first_epoch, first_step = [], 1, 0
    for size, batch, mix, length in zip(
        sizes, batches, mixes, share_epochs(epochs, phase_epochs, len(sizes)), strict=True
    ):
        if length == 0:
            continue
        # Floor, because the train loader drops the last partial batch.
        steps = num_samples // batch
        if steps == 0:
            raise UsageError(
                f"batch {batch} > {num_samples} training images (at {size} px)",
                f"give --batch-size {max(1, num_samples)} or less",
            )
        if batch % world_size:
            raise UsageError(
                f"the global batch {batch} (at {size} px) does not divide by {world_size} ranks",
                "give a --batch-size or --phase-batch-sizes that does",
            )
        phases.append(Phase(first_epoch, first_epoch + length - 1, size, batch, steps, first_step, mix))
        first_epoch, first_step = first_epoch + length, first_step + length * steps
    return tuple(phases)


def phase_of(phases: Sequence[Phase], epoch: int) -> Phase:
    return next(phase for phase in phases if phase.first_epoch <= epoch <= phase.last_epoch)


@dataclass
class TrainState:
    """Everything that must survive a restart, and nothing else.

    No RNG state: every draw is recomputed from (seed, step). `step` counts optimizer steps of the
    plan, `rows` has one row per finished and scored epoch; together they are the position.
    """

    model: nn.Module  # always the plain module: DDP and compile wrap the forward beside it
    optimizer: torch.optim.Optimizer
    schedule: object
    scaler: torch.amp.GradScaler
    ema: object
    step: int = 0
    epoch_sums: dict = field(default_factory=dict)  # of the epoch under way
    bad_in_a_row: int = 0  # steps that were not finite, and that a lower fp16 scale cannot mend
    # The best epoch, and the validations since then.
    best: dict = field(default_factory=lambda: {"score": -1.0, "epoch": 0, "waited": 0})
    rows: list = field(default_factory=list)

    def __post_init__(self):
        self.start_epoch()

    def start_epoch(self) -> None:
        self.epoch_sums = {
            "loss": 0.0,
            "images": 0,
            "seconds": 0.0,
            "waited": 0.0,
            "bad_steps": 0,
            "bad_images": 0,
        }

    PARTS = ("model", "optimizer", "schedule", "scaler", "ema")
    VALUES = ("step", "epoch_sums", "bad_in_a_row", "best", "rows")

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.VALUES}

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise DivergedError where a weight, an average, a statistic or the optimizer's memory is NaN or infinite.

        A step can be finite in loss and gradient and still ruin weights: through the optimizer's memory, or
        memory that fails. Asked before every save, so that no ruined state takes the place of a sound one.
        """
        optimizer = {
            f"parameter {k}, {name}": value
            for k, state in enumerate(self.optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        parts = {
            "weights": self.model.state_dict(),
            "optimizer": optimizer,
            "average": {} if self.ema.module is None else self.ema.module.state_dict(),
        }
        for part, tensors in parts.items():
            # Scalars are counters, which some optimizers keep on the CPU beside weights on a GPU.
            values = {
                name: value for name, value in tensors.items() if value.is_floating_point() and value.ndim
            }
            if (
                not values
                or torch.stack(torch._foreach_norm(list(values.values()), math.inf)).isfinite().all()
            ):
                continue
            name = next(name for name, value in values.items() if not value.isfinite().all())
            raise DivergedError(
                f"the {part} ({name}) held values that are not finite after step {self.step}; nothing was saved",
                "the checkpoint before is clean: go on from it with --resume auto; if it comes again, lower --lr",
            )

    def load_state_dict(self, state: dict) -> None:
        """Take over a checkpoint. Raises CheckpointError where its tensors are not what this run's would be."""
        from base.schemas import check_tensors

        check_tensors(state["model"], self.model.state_dict(), "the checkpoint's model")
        if self.ema.module is not None and "shadow" in state["ema"]:
            check_tensors(state["ema"]["shadow"], self.ema.module.state_dict(), "the checkpoint's ema.shadow")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty unless the run was in fp16; without, it starts anew
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.bad_in_a_row, self.rows = state["step"], state["bad_in_a_row"], state["rows"]
        # Older files have other counters: what this run does not count is dropped, what they lack starts at nothing.
        for mine, theirs in ((self.epoch_sums, state["epoch_sums"]), (self.best, state["best"])):
            mine.update({name: theirs[name] for name in mine if name in theirs})


MAX_BAD_STEPS = 10  # in a row, before a run is given up


class BatchNormBuffers:
    """The running statistics: copied before a forward, put back after a bad one, averaged over ranks.

    One NaN in a batch poisons them for ever, even where the optimizer step is skipped.
    """

    def __init__(self, model: nn.Module):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.live = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.averaged = [buffer for buffer in self.live if buffer.is_floating_point()]
        self.copies = [buffer.detach().clone() for buffer in self.live]

    @torch.no_grad()
    def take(self) -> None:
        if self.live:
            torch._foreach_copy_(self.copies, self.live)

    @torch.no_grad()
    def restore(self) -> None:
        if self.live:
            torch._foreach_copy_(self.live, self.copies)

    @torch.no_grad()
    def average(self, runtime: Runtime) -> None:
        """Give all ranks the mean, at every step: so any rank's state is the run's state."""
        if runtime.world_size > 1 and self.averaged:
            flat = torch.cat([buffer.flatten() for buffer in self.averaged])
            parts = (
                runtime.sum_over_ranks(flat)
                .div_(runtime.world_size)
                .split([b.numel() for b in self.averaged])
            )
            torch._foreach_copy_(
                self.averaged, [p.view_as(b) for p, b in zip(parts, self.averaged, strict=True)]
            )


@dataclass
class Step:
    """How a step is taken; everything here is a value, the same for the whole phase."""

    forward: Callable[[Tensor], Tensor]  # the model, or DDP or compile around it
    mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    runtime: Runtime
    buffers: BatchNormBuffers
    seed: int
    clip: tuple[str, float] = ("norm", 1.0)
    accumulate: int = 1
    penalty: Callable[[nn.Module], Tensor] | None = None


def train_step(state: TrainState, how: Step, images: Tensor, labels: Tensor) -> tuple[float, bool]:
    """One optimizer step on images (N, 3, H, W) and labels (N,): (mean loss, whether the step was finite).

    The gradient norm and the loss are read together, the step's only host sync. If they are not
    finite nothing moves: BatchNorm buffers go back, optimizer and EMA are passed over. The plan's
    step counts all the same, so that a resumed run does not meet the batch again. A step that is
    neither finite nor counted in `bad_in_a_row` overflowed under fp16, and the scale was lowered.
    """
    # Mixing and drop-path descend from this line, so a step is a function of (state, batch, seed).
    seed_everything(how.seed, state.step, how.runtime.rank)
    images, targets = how.mixer(images, labels)
    how.buffers.take()
    state.optimizer.zero_grad(set_to_none=True)
    loss = backward(state, how, images, targets)
    # A disabled scaler passes everything through, so fp32, bf16 and fp16 share these lines.
    state.scaler.unscale_(state.optimizer)  # clip real gradients, not scaled ones
    norm = clip_gradients(state.model.parameters(), *how.clip)
    how.buffers.average(how.runtime)
    loss = how.runtime.sum_over_ranks(loss) / how.runtime.world_size
    loss, norm = torch.stack([loss, norm.to(loss)]).tolist()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update()
    else:  # not even the scaler's own skip: fused SGD would make its momentum of uninitialised memory
        how.buffers.restore()
    state.bad_in_a_row = 0 if finite or lower_scale(state.scaler, loss) else state.bad_in_a_row + 1
    state.schedule.step()
    state.step += 1
    return loss, finite


def lower_scale(scaler: torch.amp.GradScaler, loss: float) -> bool:
    """After a step that was not finite: halve the fp16 scale if that may help; whether it may.

    It cannot where the loss itself is not finite, nor at a scale of 1, where gradients overflow by
    themselves. So from 65536 there are 16 back-offs at most in a row, and then bad steps.
    """
    before = scaler.get_scale()
    scaler.update()
    if math.isfinite(loss) and 1.0 <= scaler.get_scale() < before:
        return True
    scaler.update(max(1.0, before))
    return False


def backward(state: TrainState, how: Step, images: Tensor, targets: Tensor) -> Tensor:
    """Accumulate gradients of the batch's mean loss, in `how.accumulate` pieces; return that loss (scalar)."""
    losses = []
    pieces = list(zip(images.chunk(how.accumulate), targets.chunk(how.accumulate), strict=True))
    for k, (part, wanted) in enumerate(pieces):  # `smallest_piece` knows how chunk cuts
        last = k == len(pieces) - 1
        no_sync = getattr(how.forward, "no_sync", nullcontext)  # DDP: exchange gradients once
        with nullcontext() if last else no_sync():
            with how.runtime.autocast():
                logits = how.forward(part)
            # Outside autocast, in float32; and each piece by its own share: the last one may be smaller.
            loss = how.loss(logits, wanted) * (len(part) / len(images))
            if last and how.penalty:
                loss = loss + how.penalty(state.model)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def smallest_piece(images: int, accumulate: int) -> int:
    """Images in the smallest of the pieces that `backward` cuts a batch of `images` into: the last one."""
    return (images - 1) % math.ceil(images / accumulate) + 1


def train_one_epoch(
    state: TrainState,
    how: Step,
    batches: Iterable[tuple[Tensor, Tensor]],
    after_step: Callable[[int, bool], None],
) -> None:
    """Train on every batch; sums go into `state.epoch_sums`.

    `after_step(images in the batch, finite)` reports, saves and stops the run (by raising).
    """
    state.model.train()
    for images, labels in batches:
        loss, finite = train_step(state, how, images, labels)
        count = len(images) * how.runtime.world_size
        if finite:
            state.epoch_sums["loss"] += loss * count
            state.epoch_sums["images"] += count
        else:
            state.epoch_sums["bad_steps"] += 1
        after_step(count, finite)
        if state.bad_in_a_row >= MAX_BAD_STEPS:
            scale = f", fp16 scale {state.scaler.get_scale():g}" if state.scaler.is_enabled() else ""
            raise DivergedError(
                f"{state.bad_in_a_row} steps in a row were not finite, up to step {state.step} "
                f"at lr {state.schedule.last_lr:.2e}{scale}",
                "lower --lr (run lr_finder.py), or try --amp off; the last checkpoint is from before and clean",
            )


@dataclass(frozen=True)
class EvalResult:
    loss: float  # cross-entropy against hard labels, per sample
    top1: float  # percent
    top5: float
    num_samples: int


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    after_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, EvalResult]:
    """Score every model on every sample of `batches`, each counted once, in one pass over the data.

    Sums are divided once, at the end: a mean of per-batch means gives the samples of a short last
    batch too much weight, and so does a mean over ranks.
    """
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    # loss, top-1, top-5, samples; float64 counts exactly (MPS has none: float32 does up to 2**24)
    dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
    totals = {name: torch.zeros(4, device=runtime.device, dtype=dtype) for name in models}
    try:
        for images, labels in batches:
            for name, model in models.items() if len(labels) else ():  # all left out, or the other ranks'
                with runtime.autocast():
                    logits = model(images).float()  # (N, K)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                count = torch.tensor([len(labels)], device=runtime.device)
                totals[name] += torch.cat([loss[None], hits(logits, labels).sum(0), count]).to(dtype)
            after_batch(len(labels))
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    results = {}
    for name, sums in totals.items():
        loss, top1, top5, n = runtime.sum_over_ranks(sums).tolist()
        of = n or math.nan  # every image may have been left out
        results[name] = EvalResult(loss / of, 100 * top1 / of, 100 * top5 / of, int(n))
    return results


class EarlyStopping:
    """Says when the score that picks the best checkpoint has not improved for `patience` validations."""

    def __init__(self, patience: int | None):
        self.patience = patience

    def should_stop(self, validations_since_best: int) -> bool:
        return self.patience is not None and validations_since_best >= self.patience
