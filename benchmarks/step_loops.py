"""The training steps that benchmarks.step compares, each as a function without arguments.

All of them train the same architecture on the same batch, already on the device. Timing is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import ema
from base import flags
from base.device import Runtime, seed_everything
from harness import build
from models import build_model
from optim import build_optimizer, clip_gradients
from sources.generated import synthetic
from train_utils import TrainState, backward, train_step

CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """What is trained and how; the same for every loop of a comparison."""

    arch: str
    image_size: int
    batch_size: int
    channels_last: bool = True
    compile: bool = False
    use_blurpool: bool = False

    def config(self):
        """train.py's own flags, at their defaults but for what is compared."""
        options = ["--arch", self.arch, "--resize-schedule", self.image_size, "--batch-size", self.batch_size]
        options += ["--compile"] * self.compile + ["--use-blurpool"] * self.use_blurpool
        parser = flags.build_parser("train.py", "", "", flags.TRAIN_GROUPS)
        return flags.parse(parser, [str(option) for option in options])[0]

    def batch(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        seed_everything(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device)
        return images.to(memory_format=self.layout), torch.randint(CLASSES, (self.batch_size,), device=device)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def project(setting: Setting, runtime: Runtime) -> Callable[[], object]:
    """train.py's step: seeded mixing and drop-path, AMP, clipping, guard, EMA, schedule."""
    state, how = _built(setting, runtime)
    images, labels = setting.batch(runtime.device)
    state.model.train()
    return lambda: train_step(_endless(state), how, images, labels)


def lean(setting: Setting, runtime: Runtime) -> Callable[[], object]:
    """train.py's step without EMA: against `bare` it shows what mixing, clipping, guard and schedule cost."""
    state, how = _built(setting, runtime)
    state.ema = ema.NoEMA()
    images, labels = setting.batch(runtime.device)
    state.model.train()
    return lambda: train_step(_endless(state), how, images, labels)


def unguarded(setting: Setting, runtime: Runtime) -> Callable[[], object]:
    """`project` without what guards against steps that are not finite: the buffers' copy and the host's read."""
    state, how = _built(setting, runtime)
    images, labels = setting.batch(runtime.device)
    state.model.train()

    def step() -> None:
        _endless(state)
        seed_everything(how.seed, state.step, runtime.rank)
        mixed, targets = how.mixer(images, labels)
        state.optimizer.zero_grad(set_to_none=True)
        backward(state, how, mixed, targets)
        state.scaler.unscale_(state.optimizer)
        clip_gradients(state.model.parameters(), *how.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update()
        state.schedule.step()
        state.step += 1

    return step


def bare(setting: Setting, runtime: Runtime) -> Callable[[], object]:
    """Forward, loss, backward, optimizer, and nothing else, of the same model in the same precision."""
    config = setting.config()
    seed_everything(0)
    model = build_model(
        setting.arch,
        num_classes=CLASSES,
        drop_path_rate=config.drop_path_rate,
        use_blurpool=setting.use_blurpool,
    )
    model = model.to(runtime.device, memory_format=setting.layout).train()
    optimizer = build_optimizer(
        config.optimizer,
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=False,
        weight_decay=config.weight_decay,
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16)
    forward = build.compiled(model) if setting.compile else model
    images, labels = setting.batch(runtime.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = F.cross_entropy(forward(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def timm(setting: Setting, runtime: Runtime) -> Callable[[], object]:
    """The step of timm's train.py with the same choices. Raises ImportError where there is none.

    Its Mixup writes into the batch, which its loader makes anew each time: here it gets a copy.
    """
    import timm
    from timm import utils
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    if not timm.is_model(setting.arch):
        raise ImportError(f"timm has no {setting.arch}")
    config = setting.config()
    model = timm.create_model(setting.arch, num_classes=CLASSES, drop_path_rate=config.drop_path_rate)
    model = model.to(runtime.device, memory_format=setting.layout).train()
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
    )
    averaged = utils.ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    mixup = Mixup(
        config.mixup_alpha, config.cutmix_alpha, label_smoothing=config.label_smoothing, num_classes=CLASSES
    )
    schedule = CosineLRScheduler(optimizer, t_initial=10**6, t_in_epochs=False)
    loss_of = SoftTargetCrossEntropy()
    scaler = utils.NativeScaler() if runtime.amp_dtype == torch.float16 else None
    forward = torch.compile(model) if setting.compile else model
    images, labels = setting.batch(runtime.device)
    taken = 0

    def step() -> None:
        nonlocal taken
        mixed, targets = mixup(images.clone(), labels)
        mixed = mixed.contiguous(memory_format=setting.layout)
        with runtime.autocast():
            loss = loss_of(forward(mixed), targets)
        if scaler:
            scaler(loss, optimizer, clip_grad=config.clip_norm, parameters=list(model.parameters()))
        else:
            loss.backward()
            utils.dispatch_clip_grad(list(model.parameters()), value=config.clip_norm)
            optimizer.step()
        optimizer.zero_grad()
        taken += 1
        averaged.update(model, step=taken)
        schedule.step_update(num_updates=taken)

    return step


LOOPS: dict[str, Callable[[Setting, Runtime], Callable[[], object]]] = {
    "bare": bare,
    "project": project,
    "project, no EMA": lean,
    "project, no guard": unguarded,
    "timm": timm,
}


def variants(setting: Setting, runtime: Runtime) -> dict[str, tuple[Setting, Runtime]]:
    """The same step with one choice changed, by name; those that the device cannot run are left out."""
    precisions = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if runtime.device.type != "cuda":
        precisions.pop("fp16")
    found = {
        name: (setting, replace(runtime, amp_dtype=dtype))
        for name, dtype in precisions.items()
        if dtype != runtime.amp_dtype
    }
    found["nchw"] = (replace(setting, channels_last=False), runtime)
    found["compile"] = (replace(setting, compile=True), runtime)
    found["blurpool"] = (replace(setting, use_blurpool=True), runtime)
    for factor in (0.5, 2, 4):
        batch = math.ceil(setting.batch_size * factor)
        found[f"batch {batch}"] = (replace(setting, batch_size=batch), runtime)
    return found


def _built(setting: Setting, runtime: Runtime):
    """State and step as train.py builds them."""
    config = setting.config()
    index = synthetic(f"synthetic:classes={CLASSES},train={100 * setting.batch_size},val={CLASSES},size=8")
    phases = build.make_plan(config, index, 1)
    run = build.build(config, index, runtime, phases, Path())
    for model in (run.state.model, run.state.ema.module):  # one layout, or the average is slow to move
        model.to(memory_format=setting.layout)
    return run.state, run.make_step(phases[0])


def _endless(state: TrainState) -> TrainState:
    """Back to the first step of the plan before its last one is taken."""
    if state.step >= state.schedule.total_steps - 1:
        state.step = 0
        state.schedule.seek(0)
    return state
