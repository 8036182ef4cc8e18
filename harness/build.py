"""From flags to values: the one place where a config becomes data, a plan, a state, loaders and steps.

Above it are the scripts; below it nothing knows a flag. train.py trains what is built here,
lr_finder.py and the benchmarks measure it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import torch

import data_utils
import ema
import optim
from base import flags, process
from base.device import Runtime, init_runtime, seed_everything, unused_gpu
from base.errors import UsageError
from dataloader import Loader, eval_loader, train_loader
from harness import checkpoint, rundir
from loop import Run
from models import build_model, set_drop_path_rate
from models.summary import smallest_norm_map
from sources.index import DatasetIndex, FileSplit, Split, SubsetSplit, balanced_subset
from train_utils import BatchNormBuffers, EarlyStopping, Phase, Step, TrainState, plan, smallest_piece


def open_runtime(config) -> Runtime:
    runtime = init_runtime(config.device, config.amp, deterministic=config.deterministic)
    process.say(unused_gpu(runtime.device))
    if config.sync_bn and runtime.device.type != "cuda":
        raise UsageError("--sync-bn needs GPUs", "leave it out on a CPU")
    return _without_broken_bf16(runtime, config)


def _without_broken_bf16(runtime: Runtime, config) -> Runtime:
    """On a CPU, torch 2.13's bf16 gradient of a strided 3x3 convolution on a 1x1 map is uninitialised memory.

    Up to 16 px the last stage meets such maps (measured: 26 of 40 gradients not finite; none from 2x2 maps on).
    """
    if runtime.device.type != "cpu" or runtime.amp_dtype is None or min(config.resize_schedule) > 16:
        return runtime
    if config.amp != "auto":
        raise UsageError(
            "--amp bf16 on a CPU gives wrong gradients at 16 px and below", "use --amp off, or larger images"
        )
    return dataclasses.replace(runtime, amp_dtype=None)


def make_plan(config, index: DatasetIndex, world_size: int) -> tuple[Phase, ...]:
    phases = plan(
        config.epochs,
        config.resize_schedule,
        len(index.train),
        config.batch_size,
        phase_batch_sizes=config.phase_batch_sizes,
        phase_epochs=config.phase_epochs,
        phase_mix=config.phase_mix,
        world_size=world_size,
    )
    check_norms(config, index, phases, world_size)
    return phases


def check_norms(config, index: DatasetIndex, phases: tuple[Phase, ...], world_size: int) -> None:
    """Refuse a plan in which BatchNorm would see one value per channel: it has no variance, and torch no step."""

    @functools.cache
    def smallest_map(size: int) -> int:
        with torch.device("meta"):
            return smallest_norm_map(build_model(**model_args(config, index)), size)

    def fits(size: int, batch: int, accumulate: int = config.accumulate) -> bool:
        images, left = divmod(batch, world_size)
        together = smallest_piece(images, accumulate) * (world_size if config.sync_bn else 1) if images else 0
        return not left and (together > 1 or (together == 1 and smallest_map(size) != 1))

    for number, phase in enumerate(phases, 1):
        if fits(phase.image_size, phase.batch_size):
            continue
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        piece = f" in the smallest piece of --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UsageError(
            f"phase {number}: batch {phase.batch_size} at {phase.image_size} px leaves one image{ranks}{piece}, and "
            f"BatchNorm of {config.arch} one value per channel there",
            " or ".join(_batches_that_fit(config, phases, len(index.train), fits)),
        )


def _batches_that_fit(config, phases: tuple[Phase, ...], samples: int, fits) -> Iterator[str]:
    """What to change in a plan that `check_norms` refuses: the fewest pieces less, or images more."""
    sizes, batches = config.resize_schedule, config.phase_batch_sizes
    for pieces in range(min(config.accumulate, phases[0].batch_size) - 1, 0, -1):
        if all(fits(phase.image_size, phase.batch_size, pieces) for phase in phases):
            yield f"give --accumulate {pieces}"
            break
    if batches:
        enough = [
            next((b for b in range(batch, samples + 1) if fits(size, b)), 0)
            for size, batch in zip(sizes, batches, strict=True)
        ]
        if all(enough):
            yield f"give --phase-batch-sizes {','.join(map(str, enough))}"
    else:
        for batch in range(config.batch_size, samples + 1):
            if all(fits(size, max(1, batch >> k)) for k, size in enumerate(sizes)):
                yield f"give --batch-size {batch}"
                break
    yield "larger sizes in --resize-schedule"


def model_args(config, index) -> dict:
    """Plain values from which any tool rebuilds the model."""
    return {
        "arch": config.arch,
        "num_classes": len(index.classes),
        "drop_path_rate": config.drop_path_rate,
        "use_blurpool": config.use_blurpool,
        "head": config.head,
        "stem": config.stem,
        "image_sizes": list(config.resize_schedule),
    }


def build(
    config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...], save_dir: Path, run: str = ""
) -> Run:
    """Everything `fit` needs, as values: the state, and how to make what each phase needs."""
    state = build_state(config, index, runtime, phases)
    forward = distributed(state.model, runtime)
    sample = balanced_subset(index.train.labels, min(10_000, len(index.val), len(index.train)), seed=1)
    return Run(
        state,
        phases,
        runtime,
        save_dir,
        rundir.checkpoint_name(config.arch, index.name),
        index.val,
        SubsetSplit(index.train, sample),
        make_loader=lambda phase: build_loader(config, index, runtime, phase),
        make_eval=lambda split, phase: build_eval(config, index, runtime, split, phase),
        make_step=lambda phase: build_step(config, index, runtime, phase, state.model, forward),
        facts={
            "model_args": model_args(config, index),
            "config": flags.plain(config),
            "precision": runtime.precision,
            "fingerprint": index.fingerprint(),
            "commit": process.commit(),
            "total_steps": sum(p.steps for p in phases),
            "eval": checkpoint.eval_settings(index, phases[-1].image_size),
            **({"run": run} if run else {}),
        },
        say=process.say,
        name_of=index.train.name,
        slow_data_hint=packing_hint(config, index),
        early=EarlyStopping(config.early_stop_patience),
        eval_every=config.eval_every,
        save_every=config.save_every,
        stop_after=config.stop_after,
    )


def packing_hint(config, index: DatasetIndex) -> str:
    """What to do where full-size files cannot be decoded fast enough; '' for data that needs no decoding of such."""
    split = index.train.base if isinstance(index.train, SubsetSplit) else index.train
    if not isinstance(split, FileSplit):
        return ""
    packed = f"{config.data_dir.rstrip('/')}-packed"
    return (
        f"A copy at the training sizes is several times faster: python pack_dataset.py --data-dir {config.data_dir} "
        f"--dataset {config.dataset} --out {packed}, then train with --data-dir {packed}"
    )


def workers(config) -> int:
    """Loader processes per rank: never more than there are cores."""
    return min(config.num_workers, process.cores())


def build_loader(config, index: DatasetIndex, runtime: Runtime, phase: Phase) -> Loader:
    return train_loader(
        index,
        image_size=phase.image_size,
        batch_size=phase.batch_size,
        seed=config.seed,
        augment=flags.parse_augment(config.augment),
        num_workers=workers(config),
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        on_bad_image=config.on_bad_image,
    )


def build_eval(config, index: DatasetIndex, runtime: Runtime, split: Split, phase: Phase) -> Loader:
    """Validation always fails on a bad image; --on-bad-image is about training data, also where it is scored."""
    return eval_loader(
        split,
        index,
        image_size=phase.image_size,
        batch_size=max(64, phase.batch_size),
        num_workers=workers(config),
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        on_bad_image="fail" if split is index.val else config.on_bad_image,
    )


def build_step(
    config, index: DatasetIndex, runtime: Runtime, phase: Phase, model: torch.nn.Module, forward
) -> Step:
    """How the steps of `phase` are taken; sets the model's drop-path rate for it."""
    set_drop_path_rate(model, config.drop_path_rate if phase.mix else 0.0)
    return Step(
        forward=compiled(forward) if config.compile else forward,
        mixer=build_mixer(config, index, phase),
        loss=data_utils.LOSSES[config.loss],
        runtime=runtime,
        buffers=BatchNormBuffers(model),
        seed=config.seed,
        clip=(config.clip_mode, config.clip_norm),
        accumulate=config.accumulate,
        penalty=(lambda model: config.l1 * data_utils.l1_penalty(model.parameters())) if config.l1 else None,
    )


def build_mixer(config, index: DatasetIndex, phase: Phase) -> data_utils.BatchMixer:
    alphas = (config.mixup_alpha, config.cutmix_alpha) if phase.mix else (0.0, 0.0)
    return data_utils.BatchMixer(len(index.classes), *alphas, config.label_smoothing)


def build_state(config, index: DatasetIndex, runtime: Runtime, phases: tuple[Phase, ...]) -> TrainState:
    seed_everything(config.seed)
    model = build_model(**model_args(config, index)).to(runtime.device, memory_format=torch.channels_last)
    if config.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = optim.build_optimizer(
        config.optimizer,
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    warmup = config.warmup_epochs if config.schedule == "cosine" else 0
    schedule = optim.Schedule(
        optimizer,
        config.schedule,
        peak_lr=config.lr,
        total_steps=sum(p.steps for p in phases),
        phases=tuple((p.steps, lr_factor(config.lr_scale, p, phases[0])) for p in phases),
        warmup_steps=round(warmup * phases[0].steps_per_epoch),
        cycles=config.cycles,
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16)
    return TrainState(model, optimizer, schedule, scaler, build_ema(config, model, phases))


def take_weights(path: str, model: torch.nn.Module, reset_head: bool) -> None:
    """--init-from: other weights instead of random ones."""
    from models.convert import adapt_state_dict

    model.load_state_dict(adapt_state_dict(checkpoint.read(path), model, reset_head))


def start_from(run: Run, config) -> None:
    """--init-from: begin with other weights instead of random ones."""
    take_weights(config.init_from, run.state.model, config.reset_head)
    run.state.ema = build_ema(config, run.state.model, run.phases)
    head = ", with a new head" if config.reset_head else ""
    process.say(f"starting from the weights of {config.init_from}{head}")


def lr_factor(how: str, phase: Phase, first: Phase) -> float:
    """What --lr-scale makes of a phase's batch."""
    ratio = phase.batch_size / first.batch_size
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[how]


def build_ema(config, model: torch.nn.Module, phases: tuple[Phase, ...]) -> ema.EMA | ema.NoEMA:
    if not config.ema:
        return ema.NoEMA()
    if config.ema_half_life:
        steps = config.ema_half_life * sum(p.steps for p in phases) / config.epochs
        return ema.EMA(model, ema.decay_for_half_life(steps), ramp=False)
    return ema.EMA(model, config.ema_decay, ramp=config.ema_ramp)


def distributed(model: torch.nn.Module, runtime: Runtime) -> torch.nn.Module:
    """DistributedDataParallel beside the model on many ranks; the model itself on one."""
    if runtime.world_size == 1:
        return model
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    # The step averages buffers over ranks itself; broadcasting rank 0's would drop the others' data.
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    broadcast = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # before torch 2.13
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, **{broadcast: False}
    )


def compiled(forward):
    """torch.compile around the training forward, anew for each phase: one static shape each."""
    torch._dynamo.reset()
    return torch.compile(forward, dynamic=False)
