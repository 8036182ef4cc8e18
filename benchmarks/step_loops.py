"""The training steps that benchmarks.step compares, each a function without arguments.

All of them train the same architecture on the same batch, which is already on the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from base import flags
from base.device import Runtime, seed_everything
from harness import build
from models import build_model
from optim import OPTIMIZERS, build_optimizer
from sources.generated import synthetic
from train_utils import StepOptions, TrainState, train_step

CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """What all loops of a comparison train, and on what."""

    arch: str
    image_size: int
    batch_size: int
    runtime: Runtime
    options: tuple[str, ...] = ()  # flags of train.py, besides its defaults
    memory_format: torch.memory_format = torch.channels_last
    narrow: bool = False  # one channel wide: what is left is mostly Python

    @property
    def name(self) -> str:
        width = " of width 1" if self.narrow else ""
        return f"{self.arch}{width}, {self.image_size} px, batch {self.batch_size}, {self.runtime.precision}"

    def config(self):
        argv = ["--arch", self.arch, "--resize-schedule", str(self.image_size)]
        argv += ["--batch-size", str(self.batch_size), *self.options]
        config, _ = flags.parse(flags.train_parser(), argv)
        return replace(config, width=1) if self.narrow else config  # --width allows no less than 2

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        seed_everything(0)
        device, shape = self.runtime.device, (self.batch_size, 3, self.image_size, self.image_size)
        images = torch.randn(shape, device=device).to(memory_format=self.memory_format)
        return images, torch.randint(CLASSES, (self.batch_size,), device=device)


def project(setting: Setting) -> Callable[[], object]:
    """train.py's step: seeded mixing and drop-path, AMP, clipping, guard, EMA, schedule.

    As in train.py, the result of a step is read when the next one is on its way.
    """
    state, options = built(setting)
    images, labels = setting.batch()
    running = deque(maxlen=1)

    def step() -> None:
        following = train_step(endless(state), options, images, labels)
        for last in running:
            last.result()
        running.append(following)

    return step


def no_ema(setting: Setting) -> Callable[[], object]:
    """train.py's step with --no-ema: minus `bare`, the cost of mixing, clipping, checking and schedule."""
    return project(replace(setting, options=(*setting.options, "--no-ema")))


def bare(setting: Setting) -> Callable[[], object]:
    """Forward, loss, backward and optimizer of the same model in the same precision, and nothing else."""
    config, runtime = setting.config(), setting.runtime
    seed_everything(0)
    shape = {"drop_path_rate": config.drop_path_rate, "width": config.width}
    network = build_model(setting.arch, num_classes=CLASSES, **shape)
    network = network.to(runtime.device, memory_format=setting.memory_format).train()
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
    optimizer = build_optimizer(config.optimizer, network, lr=config.lr, **options)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16)
    images, labels = setting.batch()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = F.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def timm(setting: Setting) -> Callable[[], object]:
    """The step of timm's train.py with the same choices and optimizer kernels.

    Raises ImportError without timm or such a model.
    """
    import timm
    from timm import utils
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    if setting.narrow or not timm.is_model(setting.arch):
        raise ImportError(f"timm has no {setting.name.partition(',')[0]}")
    config, runtime = setting.config(), setting.runtime
    network = timm.create_model(setting.arch, num_classes=CLASSES, drop_path_rate=config.drop_path_rate)
    network = network.to(runtime.device, memory_format=setting.memory_format).train()
    name = {"sgd": "momentum"}.get(config.optimizer, config.optimizer)  # timm's "sgd" is Nesterov's
    kernels = {"fused": True} if OPTIMIZERS[config.optimizer][2] else {"foreach": True}
    optimizer = create_optimizer_v2(network, name, lr=config.lr, weight_decay=config.weight_decay, **kernels)
    average = utils.ModelEmaV3(network, decay=config.ema_decay, use_warmup=True)
    smoothing = {"label_smoothing": config.label_smoothing, "num_classes": CLASSES}
    mixup = Mixup(config.mixup_alpha, config.cutmix_alpha, **smoothing)
    schedule = CosineLRScheduler(optimizer, t_initial=10**6, t_in_epochs=False)
    criterion = SoftTargetCrossEntropy()
    scaler = utils.NativeScaler() if runtime.amp_dtype == torch.float16 else None
    images, labels = setting.batch()
    taken = 0

    def step() -> None:
        nonlocal taken
        mixed, targets = mixup(images.clone(), labels)  # it writes into the batch
        mixed = mixed.contiguous(memory_format=setting.memory_format)
        with runtime.autocast():
            loss = criterion(network(mixed), targets)
        if scaler:
            scaler(loss, optimizer, clip_grad=config.clip_norm, parameters=list(network.parameters()))
        else:
            loss.backward()
            utils.dispatch_clip_grad(list(network.parameters()), value=config.clip_norm)
            optimizer.step()
        optimizer.zero_grad()
        taken += 1
        average.update(network, step=taken)
        schedule.step_update(num_updates=taken)

    return step


LOOPS = {"bare": bare, "project": project, "project, no EMA": no_ema, "timm": timm}


def variants(setting: Setting) -> dict[str, Setting]:
    """Return {name: setting with one choice changed}, for what the device can run."""
    runtime = setting.runtime
    precisions = {"fp32": None, "bf16": torch.bfloat16}
    if runtime.device.type == "cuda":
        precisions["fp16"] = torch.float16
    found = {
        name: replace(setting, runtime=replace(runtime, amp_dtype=dtype))
        for name, dtype in precisions.items()
        if dtype != runtime.amp_dtype
    }
    found["nchw"] = replace(setting, memory_format=torch.contiguous_format)
    found["compile"] = replace(setting, options=("--compile",))
    if runtime.device.type == "cuda":
        found["cuda-graphs"] = replace(setting, options=("--cuda-graphs",))
    found["blurpool"] = replace(setting, options=("--use-blurpool",))
    for factor in (0.5, 2, 4):
        batch_size = math.ceil(setting.batch_size * factor)
        found[f"batch {batch_size}"] = replace(setting, batch_size=batch_size)
    return found


def built(setting: Setting) -> tuple[TrainState, StepOptions]:
    """Return state and step options as train.py builds them."""
    config, train = setting.config(), 100 * setting.batch_size
    index = synthetic(f"synthetic:classes={CLASSES},train={train},val={CLASSES},size=8")
    run = build.build(config, index, setting.runtime, build.make_plan(config, index, 1), Path())
    for network in filter(None, (run.state.model, run.state.ema.module)):
        network.to(memory_format=setting.memory_format)
    run.state.model.train()
    return run.state, run.options


def endless(state: TrainState) -> TrainState:
    """Go back to the first step before the plan ends; return the state."""
    if state.step >= state.schedule.total_steps - 1:
        state.step = 0
        state.schedule.seek(0)
    return state
