"""From flags to values: build the `Run` that `loop.fit` trains from a config and a `DatasetIndex`.

The loop and everything below it take values; only commands and `harness` read the config of train.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ema
from base import flags, process
from base.device import Runtime, init_runtime, seed_everything, unused_gpu
from base.errors import CheckpointError, UsageError
from base.files import file_crc32
from base.parser import parse_augment
from data_utils import LOSSES, BatchMixer, balanced_weights
from harness import checkpoint, rundir
from harness.norms import check_norms
from loop import Run
from models import build_model, classifier_of
from models.convert import adapt_state_dict
from optim import build_optimizer
from optim.schedule import Schedule
from optim.undo import BatchNormBuffers
from sources.archives import pretrained
from sources.imagenet import ilsvrc_names
from sources.images import TrainTransform, default_crop
from sources.index import DatasetIndex, FileSplit, read_class_weights, training_sample
from train_utils import Phase, StepOptions, TrainState, plan


def open_runtime(config) -> Runtime:
    """Choose device and precision, and join the other ranks. Raises UsageError and ResourceError."""
    runtime = init_runtime(config.device, config.amp, deterministic=config.deterministic)
    process.say(unused_gpu(runtime.device))
    if config.sync_bn and runtime.device.type != "cuda":
        raise UsageError("--sync-bn needs GPUs", "leave it out on a CPU")
    if config.cuda_graphs and runtime.device.type != "cuda":
        what = f"--cuda-graphs needs an NVIDIA GPU; this is {runtime.device}"
        raise UsageError(what, "use --no-cuda-graphs")
    # On a CPU, torch 2.13 returns uninitialized memory as the bf16 gradient of a strided 3x3 convolution
    # on a 1x1 map (26 of 40 gradients were not finite; none on a 2x2 map). The last stage of a ResNet gets
    # such a map up to 16 px (with --stem small only up to 4 px, but no stem is let through here).
    if runtime.device.type == "cpu" and runtime.amp_dtype and min(config.resize_schedule) <= 16:
        if config.amp != "auto":
            what = "--amp bf16 computes wrong gradients on a CPU at 16 px and below"
            raise UsageError(what, "use --amp off, or larger images")
        return dataclasses.replace(runtime, amp_dtype=None)
    return runtime


def make_plan(config, index: DatasetIndex, world_size: int) -> tuple[Phase, ...]:
    """Return the phases of the run. Raises UsageError for a plan that cannot be trained."""
    phases = plan(
        config.epochs,
        config.resize_schedule,
        len(index.train),
        config.batch_size,
        phase_batch_sizes=config.phase_batch_sizes,
        phase_epochs=config.phase_epochs,
        phase_mix=config.phase_mix,
        phase_augment=config.phase_augment or [config.augment] * len(config.resize_schedule),
        freeze_epochs=config.freeze_epochs,
        world_size=world_size,
    )
    check_norms(config, model_args(config, index), len(index.train), phases, world_size)
    check_augmentation(phases, index)
    return phases


def check_augmentation(phases: tuple[Phase, ...], index: DatasetIndex) -> None:
    """Try Albumentations' pipelines on a grey image of each size. Raises UsageError and DataError."""
    for phase in phases:
        steps = parse_augment(phase.augment)
        if any(name == "pipeline" for name, _ in steps):
            grey = np.full((phase.image_size, phase.image_size, 3), 128, np.uint8)
            TrainTransform(steps, phase.image_size, index.mean)(grey, (0, 0, 0))


def build(
    config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...], save_dir: Path, run_id: str = ""
) -> Run:
    """Build the training state and everything else that `loop.fit` needs."""
    state = build_state(config, index, runtime, phases)
    num_classes, smoothing = len(index.classes), config.label_smoothing

    def wrap(model):  # called again when other parameters get gradients, as DDP requires
        return compiled(distributed(model, runtime), config, len(phases))

    mixing = BatchMixer(num_classes, config.mixup_alpha, config.cutmix_alpha, smoothing)
    options = StepOptions(
        forward=wrap(state.model),
        mixer=mixing,
        loss=build_loss(config, index, runtime.device),
        runtime=runtime,
        buffers=BatchNormBuffers(state.model),
        seed=config.seed,
        clip=(config.clip_mode, config.clip_norm),
        accumulate=config.accumulate,
        l1=config.l1,
    )
    return Run(
        state,
        phases,
        runtime,
        index=index,
        train_sample=training_sample(index),
        num_workers=min(config.num_workers, process.cores()),  # per rank
        on_bad_image=config.on_bad_image,
        options=options,
        mixers={True: mixing, False: BatchMixer(num_classes, 0.0, 0.0, smoothing)},
        drop_path_rate=config.drop_path_rate,
        wrap=wrap,
        save_dir=save_dir,
        checkpoint_name=rundir.checkpoint_name(config.arch, index.name),
        metadata=metadata(config, index, runtime, phases) | ({"run": run_id} if run_id else {}),
        patience=config.early_stop_patience,
        eval_every=config.eval_every,
        eval_size=config.eval_size,
        eval_crop=config.eval_crop,
        eval_flip=config.eval_flip,
        crop_root=str(save_dir / rundir.EVAL_CROPS) if config.cache_eval else "",
        save_every=config.save_every,
        stop_after=config.stop_after,
        data_hint=packing_hint(config, index),
    )


def build_loss(config, index: DatasetIndex, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss with its class weights or its threshold. Raises UsageError and DataError."""
    options = {}
    if config.class_weights and config.loss == "ce":
        options["weights"] = class_weights(config.class_weights, index).to(device)
    if config.bce_threshold is not None and config.loss == "bce":
        smoothing = config.label_smoothing
        off, on = smoothing / len(index.classes), 1 - smoothing + smoothing / len(index.classes)
        if not off <= config.bce_threshold < on:
            what = (
                f"--bce-threshold {config.bce_threshold:g} does not separate the targets {off:g} and {on:g}"
            )
            raise UsageError(what, "use a threshold between these smoothed targets, or --label-smoothing 0")
        options["threshold"] = config.bce_threshold
    return functools.partial(LOSSES[config.loss], **options) if options else LOSSES[config.loss]


def class_weights(source: str, index: DatasetIndex) -> Tensor:
    """Return the weights (K,) float32 of --class-weights. Raises UsageError and DataError."""
    if source != "balanced":
        return torch.tensor(read_class_weights(source, index.classes))
    counts = torch.bincount(torch.as_tensor(index.train.labels), minlength=len(index.classes))
    if (counts == counts[0]).all():
        what = f"--class-weights balanced would do nothing: every class has {counts[0]} training images"
        raise UsageError(what, "leave it out")
    return balanced_weights(counts)


def build_state(config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...]) -> TrainState:
    """Build the model and its optimizer, schedule, loss scaler and average, on the device."""
    seed_everything(config.seed)
    model = build_model(**model_args(config, index)).to(runtime.device, memory_format=torch.channels_last)
    if config.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(
        config.optimizer,
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        backbone_lr=config.backbone_lr,
        head=classifier_of(model).parameters(),
    )
    schedule = build_schedule(config, optimizer, phases)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16)
    return TrainState(model, optimizer, schedule, scaler, build_ema(config, model, phases))


def build_schedule(config, optimizer: torch.optim.Optimizer, phases: tuple[Phase, ...]) -> Schedule:
    return Schedule(
        optimizer,
        config.schedule,
        peak_lr=config.lr,
        total_steps=sum(p.steps for p in phases),
        phases=tuple((p.steps, lr_factor(config.lr_scale, p, phases[0])) for p in phases),
        warmup_steps=steps_of(config.warmup_epochs, phases) if config.schedule == "cosine" else 0,
        cycles=config.cycles,
        patience=config.plateau_patience,
    )


def model_args(config, index) -> dict:
    """Return the arguments of `models.build_model`, from which any tool can rebuild the model."""
    width = {"width": config.width} if config.width else {}
    return width | {
        "arch": config.arch,
        "num_classes": len(index.classes),
        "drop_path_rate": config.drop_path_rate,
        "use_blurpool": config.use_blurpool,
        "head": config.head,
        "stem": config.stem,
        "image_sizes": list(config.resize_schedule),
    }


def metadata(config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...]) -> dict:
    """Return what every checkpoint holds besides the training state."""
    size = config.eval_size or phases[-1].image_size
    crop = config.eval_crop or default_crop(size, index.native_size)
    files = {name: file_crc32(path) for name, path in rundir.files_of_flags(config).items()}
    return ({"files": files} if files else {}) | {
        "model_args": model_args(config, index),
        "config": flags.plain(config),
        "precision": runtime.precision,
        "fingerprint": index.fingerprint(),
        "commit": process.commit(),
        "total_steps": sum(p.steps for p in phases),
        "eval": checkpoint.eval_settings(index, size, crop, config.eval_flip),
    }


def steps_of(epochs: float, phases: tuple[Phase, ...]) -> int:
    """Return the number of steps in the first `epochs` epochs, which may end within one."""
    parts = (min(max(epochs - (p.first_epoch - 1), 0), p.epochs) for p in phases)  # epochs of each phase
    return round(sum(p.steps_per_epoch * part for p, part in zip(phases, parts, strict=True)))


def lr_factor(scale: str, phase: Phase, first: Phase) -> float:
    """Return the factor that --lr-scale applies to the learning rate of `phase`."""
    ratio = phase.batch_size / first.batch_size
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[scale]


def build_ema(config, model: torch.nn.Module, phases: tuple[Phase, ...]) -> ema.EMA | ema.NoEMA:
    if not config.ema:
        return ema.NoEMA()
    if config.ema_half_life:
        steps = config.ema_half_life * sum(p.steps for p in phases) / config.epochs
        return ema.EMA(model, 0.5 ** (1 / steps), ramp=False)  # a weight's share halves every `steps` updates
    return ema.EMA(model, config.ema_decay, ramp=config.ema_ramp)


def load_weights(run: Run, config) -> str:
    """Start from the weights of --pretrained or --init-from; the average starts as a copy of them.

    Return what to say about it; '' without these flags. Raises CheckpointError.
    """
    if config.pretrained:
        path = pretrained.find(config.arch, config.pretrained)
        what, reset = f"torchvision's weights, {path}", run.index.classes != tuple(ilsvrc_names())
    elif config.init_from:
        path, reset = config.init_from, config.reset_head
        what = f"the weights of {path}"
    else:
        return ""
    weights = checkpoint.read(path)
    if config.pretrained and "model_args" in weights:
        fix = f"start from it with --init-from {path} --reset-head"
        raise CheckpointError(f"{path} is a checkpoint of train.py, not torchvision's", fix)
    run.state.model.load_state_dict(adapt_state_dict(weights, run.state.model, reset))
    run.state.ema = build_ema(config, run.state.model, run.phases)
    head = f"a new head for {len(run.index.classes)} classes" if reset else "their head"
    return f"starting from {what}, with {head}"


def packing_hint(config, index: DatasetIndex) -> str:
    """Return advice on loading image files faster, or '' if the data is not image files."""
    if not isinstance(index.train.whole, FileSplit):
        return ""
    data, packed = map(shlex.quote, (config.data_dir, f"{config.data_dir.rstrip('/')}-packed"))
    chosen = {flag.name: getattr(config, flag.name) for flag in flags.SOURCE if flag.name != "data_dir"}
    words = shlex.join(flags.to_argv({name: v for name, v in chosen.items() if v != flags.defaults()[name]}))
    command = f"python pack_dataset.py --data-dir {data} {words + ' ' * bool(words)}--out {packed}"
    return f"A packed copy loads several times faster: {command}, then train with --data-dir {packed}"


def distributed(model: torch.nn.Module, runtime: Runtime) -> torch.nn.Module:
    """Return DistributedDataParallel around the model on several ranks, the model itself on one."""
    if runtime.world_size == 1:
        return model
    ddp = torch.nn.parallel.DistributedDataParallel
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    # train_step averages the buffers over the ranks; DDP would overwrite them with those of rank 0.
    new_name = "forward_sync_buffers" in inspect.signature(ddp).parameters
    sync_buffers = "forward_sync_buffers" if new_name else "broadcast_buffers"  # before torch 2.13
    return ddp(model, device_ids=devices, gradient_as_bucket_view=True, **{sync_buffers: False})


def compiled(forward: Callable[[Tensor], Tensor], config, phases: int) -> Callable[[Tensor], Tensor]:
    """Return the training forward pass as --compile and --cuda-graphs ask for it; `forward` without them.

    It is compiled at the first call with each shape, and what was compiled for a phase is kept.
    """
    if not (config.compile or config.cuda_graphs):
        return forward
    torch._dynamo.reset()  # what another run in this process has compiled counts towards the limit
    torch._dynamo.config.recompile_limit = max(8, 2 * phases)  # pieces of --accumulate have two shapes
    if not config.cuda_graphs:
        return torch.compile(forward, dynamic=False)
    graphs = torch.compile(forward, dynamic=False, mode="reduce-overhead")

    def replayed(images: Tensor) -> Tensor:
        # A new step: the logits and gradients of the last one, which the graphs own, may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        return graphs(images)

    return replayed
