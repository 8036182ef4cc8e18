"""Find a learning rate for train.py, with its own flags, data, loss, mixing, clipping and precision.

--mode loss      raise the rate at every step until the loss diverges (https://arxiv.org/abs/1506.01186)
--mode accuracy  train briefly at each of several peak rates and compare validation accuracy

In --mode loss every step is `train_utils.train_step`, the step of training. Only the schedule is replaced, by
the rising rate, and no average of the weights is kept.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from base import files, flags, process
from base.errors import UsageError, doing
from base.errors import run as run_command

EPILOG = """examples:
  python lr_finder.py --data-dir ./data/imagenet              where the rate is highest: 224 px, batch 64
  python lr_finder.py --phase 1 --num-iter 400 --out out      the first phase, in finer steps
  python lr_finder.py --config recipes/digits.yaml --mode accuracy --trials 6 --trial-epochs 2"""
MIN_STEPS = 10  # fewer losses make no curve


def no_trials(config) -> str | bool:
    return config.mode == "loss" and "it needs --mode accuracy"


# fmt: off
FINDER = (
    flags.Flag("mode", "What to measure at each rate.", ("loss", "accuracy"), "loss", "NAME"),
    flags.Flag("phase", "Test the image size, batch size and mixing of this phase; by default the last "
               "one in which the schedule comes close to its highest rate.", flags.positive, None, "K"),
    flags.Flag("num_iter", "Steps of --mode loss.", flags.number(int, MIN_STEPS, 5000), 200, "N",
               idle=lambda c: c.mode == "accuracy" and "--mode accuracy takes --trials and --trial-epochs"),
    flags.Flag("start_lr", "Lowest rate; by default 1e-7, or 1e-4 with --mode accuracy.",
               flags.above_zero, None, "LR"),
    flags.Flag("end_lr", "Highest rate; by default 10, or 0.1 with --mode accuracy.",
               flags.above_zero, None, "LR"),
    flags.Flag("trials", "Runs of --mode accuracy.", flags.number(int, 2), 7, "N",
               idle=no_trials),
    flags.Flag("trial_epochs", "Epochs of each run.", flags.positive, 2, "N", idle=no_trials),
    flags.Flag("out", "Output directory; by default --save-dir.", str, "", "DIR"),
)
# fmt: on
# Flags that affect only the training: accepted and copied into its command, so that both take a run's flags.
PASSED_ON = {flag.name for flag in (*flags.SCORING, *flags.LOGGING)} | {"save_every"}
TRAIN_ONLY = {"resume", "allow_change", "overwrite", "stop_after", "summary", "dry_run"}
GROUPS = {"range test": FINDER} | {
    title: [flags.hidden(flag) if flag.name in PASSED_ON | {"lr"} else flag for flag in group]
    for title, group in flags.train_groups(leave_out=TRAIN_ONLY).items()
}


def build_parser() -> flags.Parser:
    description = "Find a learning rate for a run, with that run's own flags."
    parser = flags.build_parser("lr_finder.py", description, EPILOG, GROUPS)
    parser.elsewhere = {"train.py": set(map(flags.dashed, TRAIN_ONLY))}
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    low, high = rate_limits(config)
    # The code below reads any flag of train.py; those that this command lacks get their defaults.
    config = flags.make_config(flags.defaults() | flags.plain(config))
    if "lr" in given.by_hand:  # a recipe may bring it
        raise UsageError("--lr would do nothing: this command finds the learning rate", "leave --lr out")
    notes = flags.refuse_idle(FINDER, config, given) + flags.check_train(config, given)
    if later := [flags.dashed(name) for name in sorted(PASSED_ON & given.by_hand)]:
        notes.append(f"{', '.join(later)}: passed to train.py")
    if process.world_size() > 1:
        raise UsageError("a range test runs on one device", "start it with python, not with torchrun")
    from sources import folders, layouts
    from sources.archives import pretrained

    doing("loading the data and torch")
    index = layouts.open_dataset(**flags.data_args(config))
    index = pretrained.prepare(index, **flags.weights_args(config))
    config, fitted = flags.fit_to_data(config, given, len(index.train))
    for note in (*notes, *index.notes, fitted):
        process.say(note)

    from analysis import lr_range_test
    from harness import build

    phases = build.make_plan(config, index, world_size=1)
    phase = choose_phase(config, phases)
    runtime = build.open_runtime(config)
    folders.check_outside(index, config.out or config.save_dir, "--out")
    out = files.make_directory(Path(config.out or config.save_dir))
    if config.mode == "accuracy":
        lrs = lr_range_test.geometric(low, high, config.trials)
        found = lr_range_test.compare_trainings(trial_flags(config, phase), lrs, config.trial_epochs)
    else:
        run = build.build(config, index, runtime, phases, out)
        process.say(build.load_weights(run, config))
        found = lr_range_test.measure(run, phase, low, high, config.num_iter, MIN_STEPS)
    # --lr is the rate of the first phase, from which --lr-scale computes the one that was found.
    factor = build.lr_factor(config.lr_scale, phase, phases[0])
    suggestions = {name: lr for name, lr in found["suggestions"].items() if lr is not None}
    subject = {
        "mode": config.mode,
        "phase": phases.index(phase) + 1,
        "image_size": phase.image_size,
        "batch_size": phase.batch_size,
        "flags": flags.plain(config),
    }
    commands = {name: training_command(argv, lr / factor) for name, lr in suggestions.items()}
    lr_range_test.write_results(subject | found | {"commands": commands}, out)
    return 0


def choose_phase(config, phases: tuple):
    """Return --phase; by default the last phase that comes within 5 % of the schedule's highest rate.

    That rate, --lr, is what the command looks for.
    """
    import torch

    from harness import build, dryrun

    if config.phase is None:
        schedule = build.build_schedule(config, torch.optim.SGD([torch.zeros(1)], 1.0), phases)
        highest = [dryrun.lr_range(schedule, phase)[1] for phase in phases]
        return [p for p, rate in zip(phases, highest, strict=True) if rate >= 0.95 * max(highest)][-1]
    if config.phase > len(phases):
        what = f"--phase {config.phase}, but the plan has {len(phases)} phases"
        raise UsageError(what, "run python train.py --dry-run to see the plan")
    return phases[config.phase - 1]


def rate_limits(config) -> tuple[float, float]:
    defaults = (1e-4, 0.1) if config.mode == "accuracy" else (1e-7, 10.0)
    low, high = config.start_lr or defaults[0], config.end_lr or defaults[1]
    if not low < high:
        raise UsageError(f"--start-lr {low:g} is not below --end-lr {high:g}", "give a lower --start-lr")
    return low, high


def trial_flags(config, phase) -> dict:
    """Return the flags of train.py for a short run of `phase` alone, without those left at their defaults."""
    values = {name: getattr(config, name) for name in flags.defaults()}
    values |= {
        name: flags.BY_NAME[name].default for name in PASSED_ON - {"eval_size", "eval_crop", "eval_flip"}
    }
    values |= {
        "epochs": config.trial_epochs,
        "resize_schedule": (phase.image_size,),
        "batch_size": phase.batch_size,
        "phase_batch_sizes": None,
        "phase_epochs": None,
        "phase_mix": (phase.mix,),
        "augment": phase.augment,
        "phase_augment": None,
        "freeze_epochs": config.trial_epochs if phase.head_only else 0,
        "lr_scale": "none",
        "config": "",
    }
    if config.schedule == "cosine":
        values["warmup_epochs"] = min(config.warmup_epochs, config.trial_epochs / 5)
    idle = flags.idle_flags(flags.make_config(values))  # such as flags about several phases
    # Always the batch size, because train.py fits its default to the data; with --pretrained, whose defaults
    # differ, every flag.
    defaults = {} if config.pretrained else flags.defaults()
    given = {name for name, v in values.items() if name not in defaults or v != defaults[name]}
    wanted = (given | {"batch_size"}) - idle
    return {name: values[name] for name in values if name in wanted}


def training_command(argv: list[str] | None, lr: float) -> str:
    """Return the command line of train.py for `lr`: this one without the flags that only lr_finder.py has."""
    own = flags.Parser(prog="lr_finder.py", add_help=False)
    flags.add_flags(own, "range test", FINDER)
    _, rest = own.parse_known_args(argv)
    return shlex.join(["python", "train.py", *rest, "--lr", f"{lr:.2g}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
