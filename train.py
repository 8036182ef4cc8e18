"""Train a ResNet-50: flags -> config -> build -> fit. Read it from top to bottom."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import flags
from errors import CheckpointError, UsageError, run

EPILOG = """examples:
  python train.py --epochs 90 --drop-path-rate 0.2          ImageNet in ./data/imagenet, the documents' recipe
  python train.py --resume auto                             go on where --save-dir stopped
  python train.py --dataset digits --config recipes/digits.yaml    five minutes on two CPU cores
  python train.py --dry-run                                 the plan, two steps at every size, hours to expect"""


def build_parser() -> flags.Parser:
    return flags.build_parser("train.py", "Train a ResNet-50 (or another architecture) from scratch.", EPILOG,
                              flags.TRAIN_GROUPS)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Usage, paths and the data layout are judged first, before torch is imported or a file written."""
    config, typed = flags.parse(build_parser(), argv)
    notes = flags.check_train(config, typed)
    import rundir

    saved = rundir.find_resume(config.resume, config.save_dir, say)
    if saved:
        config = rundir.resumed_config(config, typed, saved["config"])
    index = find_data(config)
    for note in (*notes, *index.notes):
        say(note)
    if config.summary or config.dry_run:
        return look_only(config, index)
    save_dir, lock = Path(config.save_dir), None
    if is_main():
        save_dir = rundir.prepare(config.save_dir, resuming=bool(config.resume), overwrite=config.overwrite)
        lock = rundir.Lock(save_dir)
        if config.overwrite:
            rundir.clear(save_dir)
    try:
        return train(config, index, save_dir, saved)
    finally:
        if lock:
            lock.release()


def find_data(config):
    from sources import layouts
    from sources.index import take_subset

    index = layouts.index(config.dataset, config.data_dir, split=config.split, class_list=config.class_list or None,
                          allow_class_mismatch=config.allow_class_mismatch)  # fmt: skip
    return take_subset(index, config.subset_size) if config.subset else index


def look_only(config, index) -> int:
    """--summary and --dry-run: look at the run without starting it."""
    import preflight

    phases = make_plan(config, index, world_size=1)
    if config.summary:
        preflight.print_summary(model_args(config, index), phases)
        return 0
    with preflight.temporary_directory() as directory:
        preflight.dry_run(build(config, index, open_runtime(config), phases, directory))
    return 0


def train(config, index, save_dir: Path, saved: dict | None) -> int:
    """Build the run, take over a checkpoint if there is one, and fit."""
    import rundir
    import trainer
    from metrics import MetricLogger
    from runtime import environment

    runtime = open_runtime(config)
    built = build(config, index, runtime, make_plan(config, index, runtime.world_size), save_dir)
    if saved:
        restore(built, saved, config)
    elif config.init_from:
        start_from(built, config)
    if built.finished:
        say(f"this run is complete: {len(built.state.rows)} epochs in {save_dir}")
        return 0
    if runtime.is_main:
        facts = environment(runtime) | {"command": " ".join(sys.argv), "commit": commit()}
        rundir.write_json(save_dir / "config.json", flags.plain(config))
        rundir.write_json(save_dir / "env.json", facts)
    log = MetricLogger(save_dir, built.state.rows, enabled=runtime.is_main, tensorboard=config.tensorboard,
                       wandb_project=config.wandb, config=flags.plain(config))  # fmt: skip
    say("\n".join(introduction(built, config, index)))
    with built.stop.installed():
        try:
            trainer.fit(built, log)
        except trainer.Finished as reached:
            say(str(reached))
            return 0
        finally:
            log.close()
    say(conclusion(built, config))
    return 0


def introduction(built, config, index) -> list[str]:
    from models import notes
    from trainer import ROW_HEADER

    runtime = built.runtime
    lines = [f"{config.arch}, {sum(p.numel() for p in built.state.model.parameters()):,} parameters, on {runtime.device} "
             f"({runtime.precision}), {len(index.train):,} + {len(index.val):,} images of {len(index.classes)} classes"]  # fmt: skip
    if runtime.device.type == "cpu" and config.device == "auto":
        lines.append("no GPU found: training on the CPU")
    if workers(config) < config.num_workers:
        lines.append(f"{config.num_workers} loader workers asked for, {flags.cores()} cores: using {workers(config)}")
    lines += notes(config.arch, drop_path_rate=config.drop_path_rate, use_blurpool=config.use_blurpool)
    for p in built.phases:
        lines.append(f"epochs {p.first_epoch:>3}-{p.last_epoch:<3} {p.image_size:>4} px  batch {p.batch_size:>4}  "
                     f"{p.steps:>9,} steps" + ("" if p.mix else "  no mixing, no drop-path"))  # fmt: skip
    return [*lines, ROW_HEADER]


def conclusion(built, config) -> str:
    best = built.state.best
    lines = [f"done: best top-1 {best['score']:.2f} % at epoch {best['epoch']}, in {built.path('best')}"]
    if config.plot:
        lines.append(f"curves: {built.save_dir / 'plots' / 'curves.png'}")
    data = f"--dataset {config.dataset}" if config.dataset in ("digits", "synthetic") else f"--data-dir {config.data_dir}"
    return "\n".join([*lines, f"next: python validate.py {built.path('best')} {data}"])


def say(text: str) -> None:
    """Print on the first rank."""
    if text and is_main():
        print(text, flush=True)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def commit() -> str:
    """The commit this code is at, with + for changes on top; empty outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (subprocess.run([*git, *words], capture_output=True, text=True, timeout=5).stdout.strip()
                         for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]))  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head + ("+" if changes else "")


def open_runtime(config):
    from runtime import init_runtime, unused_gpu

    runtime = init_runtime(config.device, config.amp, deterministic=config.deterministic)
    say(unused_gpu(runtime.device))
    if config.sync_bn and runtime.device.type != "cuda":
        raise UsageError("--sync-bn needs GPUs", "leave it out on a CPU")
    return runtime


def make_plan(config, index, world_size: int):
    from train_utils import plan

    return plan(config.epochs, config.resize_schedule, len(index.train), config.batch_size,
                phase_batch_sizes=config.phase_batch_sizes, phase_epochs=config.phase_epochs,
                phase_mix=config.phase_mix, world_size=world_size)  # fmt: skip


def model_args(config, index) -> dict:
    """Plain values from which any tool rebuilds the model."""
    return {"arch": config.arch, "num_classes": len(index.classes), "drop_path_rate": config.drop_path_rate,
            "use_blurpool": config.use_blurpool, "head": config.head, "stem": config.stem,
            "image_sizes": list(config.resize_schedule)}  # fmt: skip


# --- build: from flags to values --------------------------------------------------------------------


def build(config, index, runtime, phases, save_dir: Path):
    """Everything `fit` needs, as values: the state, and how to make what each phase needs."""
    import rundir
    from sources.index import SubsetSplit, balanced_subset
    from train_utils import EarlyStopping
    from trainer import Run

    state = build_state(config, index, runtime, phases)
    forward = distributed(state.model, runtime)
    sample = balanced_subset(index.train.labels, min(10_000, len(index.val), len(index.train)), seed=1)
    return Run(
        state, phases, runtime, save_dir, f"{config.arch}_{index.name}.pt", index.val, SubsetSplit(index.train, sample),
        make_loader=lambda phase: build_loader(config, index, runtime, phase),
        make_eval=lambda split, phase: build_eval(config, index, runtime, split, phase),
        make_step=lambda phase: build_step(config, index, runtime, phase, state.model, forward),
        facts={
            "model_args": model_args(config, index), "config": flags.plain(config), "precision": runtime.precision,
            "fingerprint": index.fingerprint(), "commit": commit(), "total_steps": sum(p.steps for p in phases),
            "eval": rundir.eval_facts(index, phases[-1].image_size),
        },
        say=say, name_of=index.train.name, early=EarlyStopping(config.early_stop_patience), eval_every=config.eval_every,
        save_every=config.save_every, stop_after=config.stop_after,
        after_epoch=(lambda: draw(save_dir)) if config.plot and runtime.is_main else lambda: None,
    )  # fmt: skip


def workers(config) -> int:
    return min(config.num_workers, flags.cores())


def build_loader(config, index, runtime, phase):
    from dataloader import train_loader

    return train_loader(index, image_size=phase.image_size, batch_size=phase.batch_size, seed=config.seed,
                        augment=flags.parse_augment(config.augment), num_workers=workers(config), device=runtime.device,
                        rank=runtime.rank, world_size=runtime.world_size, on_bad_image=config.on_bad_image)  # fmt: skip


def build_eval(config, index, runtime, split, phase):
    from dataloader import eval_loader

    return eval_loader(split, index, image_size=phase.image_size, batch_size=max(64, phase.batch_size),
                       num_workers=workers(config), device=runtime.device, rank=runtime.rank,
                       world_size=runtime.world_size)  # fmt: skip


def build_step(config, index, runtime, phase, model, forward):
    """How the steps of `phase` are taken; sets the model's drop-path rate for it."""
    import data_utils

    from models import set_drop_path_rate
    from train_utils import BatchNormBuffers, Step

    set_drop_path_rate(model, config.drop_path_rate if phase.mix else 0.0)
    alphas = (config.mixup_alpha, config.cutmix_alpha) if phase.mix else (0.0, 0.0)
    return Step(
        forward=compiled(forward) if config.compile else forward,
        mixer=data_utils.BatchMixer(len(index.classes), *alphas, config.label_smoothing),
        loss=data_utils.LOSSES[config.loss],
        runtime=runtime,
        buffers=BatchNormBuffers(model),
        seed=config.seed,
        clip=(config.clip_mode, config.clip_norm),
        accumulate=config.accumulate,
        penalty=(lambda model: config.l1 * data_utils.l1_penalty(model.parameters())) if config.l1 else None,
    )


def build_state(config, index, runtime, phases):
    import optim
    import torch

    from models import build_model
    from runtime import seed_everything
    from train_utils import TrainState

    seed_everything(config.seed)
    model = build_model(**model_args(config, index)).to(runtime.device, memory_format=torch.channels_last)
    if config.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = optim.build_optimizer(config.optimizer, model, lr=config.lr, momentum=config.momentum,
                                      nesterov=config.nesterov, weight_decay=config.weight_decay)  # fmt: skip
    schedule = optim.Schedule(optimizer, config.schedule, peak_lr=config.lr, total_steps=sum(p.steps for p in phases),
                              phases=tuple((p.steps, lr_factor(config.lr_scale, p, phases[0])) for p in phases),
                              warmup_steps=round(config.warmup_epochs * phases[0].steps_per_epoch), cycles=config.cycles)  # fmt: skip
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16)
    return TrainState(model, optimizer, schedule, scaler, build_ema(config, model, phases))


def lr_factor(how: str, phase, first) -> float:
    """What --lr-scale makes of a phase's batch."""
    ratio = phase.batch_size / first.batch_size
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[how]


def build_ema(config, model, phases):
    import ema

    if not config.ema:
        return ema.NoEMA()
    if config.ema_half_life:
        steps = config.ema_half_life * sum(p.steps for p in phases) / config.epochs
        return ema.EMA(model, ema.decay_for_half_life(steps), ramp=False)
    return ema.EMA(model, config.ema_decay, ramp=config.ema_ramp)


def distributed(model, runtime):
    """DistributedDataParallel beside the model on many ranks; the model itself on one."""
    if runtime.world_size == 1:
        return model
    import torch

    devices = [runtime.device] if runtime.device.type == "cuda" else None
    # The step averages buffers over ranks itself; broadcasting rank 0's would drop the others' data.
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)  # fmt: skip


def compiled(forward):
    """torch.compile around the training forward, anew for each phase: one static shape each."""
    import torch

    torch._dynamo.reset()
    return torch.compile(forward, dynamic=False)


def restore(built, saved: dict, config) -> None:
    """Take over a checkpoint's state; refuse one that this run cannot go on from."""
    import rundir
    from trainer import replan

    rundir.check_precision(saved["precision"], built.runtime.precision, config.allow_change)
    say(rundir.check_fingerprint(saved["fingerprint"], built.facts["fingerprint"], config.allow_change))
    same_plan = saved["total_steps"] == built.facts["total_steps"]
    rundir.check_model_args(saved["model_args"], built.facts["model_args"])
    if not same_plan:
        saved = saved | {"schedule": saved["schedule"] | {"position": 0}}
    try:
        built.state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint does not fit this run: {str(error).splitlines()[0]}",
                              "start a new run from its weights with --init-from") from error  # fmt: skip
    if not same_plan:
        replan(built)


def start_from(built, config) -> None:
    """--init-from: other weights instead of random ones."""
    from models.convert import adapt_state_dict

    import checkpoint

    weights = adapt_state_dict(checkpoint.read(config.init_from), built.state.model, config.reset_head)
    built.state.model.load_state_dict(weights)
    built.state.ema = build_ema(config, built.state.model, built.phases)
    say(f"starting from the weights of {config.init_from}" + (", with a new head" if config.reset_head else ""))


def draw(save_dir: Path) -> None:
    """Curves from the run's files, in a process of their own: a failing picture must not cost a run."""
    command = [sys.executable, "-m", "analysis.plots", str(save_dir.resolve())]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        say(f"WARNING: no plots: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


if __name__ == "__main__":
    sys.exit(run(main))
