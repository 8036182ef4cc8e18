"""Find a learning rate for train.py, with its own flags, data, loss, mixing, clipping and precision.

--mode loss      raise the rate at every step until the loss diverges (https://arxiv.org/abs/1506.01186)
--mode accuracy  train briefly at each of several peak rates and compare validation accuracy

In --mode loss every step is `train_utils.train_step`, the step of training. Only the schedule is replaced, by
the rising rate, and no average of the weights is kept.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from base import flags, process
from base.errors import DivergedError, ResourceError, UsageError, UserError
from base.errors import run as run_command

EPILOG = """examples:
  python lr_finder.py --data-dir ./data/imagenet              phase 1: 64 px, batch 256
  python lr_finder.py --phase 3 --num-iter 400 --out out      the last phase, in finer steps
  python lr_finder.py --config recipes/digits.yaml --mode accuracy --trials 6 --trial-epochs 2"""
MIN_STEPS = 10  # fewer losses are no curve
HEADLINE = "valley"  # the suggestion that depends least on single losses


def no_trials(config) -> str | bool:
    return config.mode == "loss" and "it needs --mode accuracy"


# fmt: off
FINDER = (
    flags.Flag("mode", "trace", "What to measure at each rate.", ("loss", "accuracy"), "loss", "NAME"),
    flags.Flag("phase", "trace", "Test the image size, batch size and mixing of this phase.",
               flags.positive, 1, "K"),
    flags.Flag("num_iter", "trace", "Steps of --mode loss.", flags.number(int, MIN_STEPS), 200, "N",
               idle=lambda c: c.mode == "accuracy" and "--mode accuracy takes --trials and --trial-epochs"),
    flags.Flag("start_lr", "trace", "Lowest rate; by default 1e-7, or 1e-4 with --mode accuracy.",
               flags.above_zero, None, "LR"),
    flags.Flag("end_lr", "trace", "Highest rate; by default 10, or 0.1 with --mode accuracy.",
               flags.above_zero, None, "LR"),
    flags.Flag("trials", "trace", "Trainings of --mode accuracy.", flags.number(int, 2), 7, "N",
               idle=no_trials),
    flags.Flag("trial_epochs", "trace", "Epochs of each training.", flags.positive, 2, "N", idle=no_trials),
    flags.Flag("out", "files", "Output directory; by default --save-dir.", str, "", "DIR"),
)
# fmt: on
SHARED = [flag for flag in flags.RUN if flag.name in ("save_dir", "config", "debug")]
GROUPS = {"range test": FINDER} | flags.TRAIN_GROUPS | {"run": SHARED}


def build_parser() -> flags.Parser:
    description = "Find a learning rate for a run, with that run's own flags."
    return flags.build_parser("lr_finder.py", description, EPILOG, GROUPS)


def main(argv: list[str] | None = None) -> int:
    config, given = flags.parse(build_parser(), argv)
    low, high = rate_limits(config)
    # What is called below may read any flag of train.py: those that are no flags here get their defaults.
    config = flags.make_config(flags.defaults() | flags.plain(config))
    if "lr" in given.by_hand:  # a recipe may bring it
        raise UsageError("--lr would do nothing: this command looks for it", "leave --lr out")
    notes = flags.refuse_idle(FINDER, config, given) + flags.check_train(config, given)
    if process.world_size() > 1:
        raise UsageError("a range test runs on one device", "start it with python, not with torchrun")
    from sources import layouts

    index = layouts.open_dataset(**flags.data_args(config))
    for note in (*notes, *index.notes, flags.workers_note(config.num_workers)):
        process.say(note)
    from harness import build

    phases = build.make_plan(config, index, world_size=1)
    if config.phase > len(phases):
        what = f"--phase {config.phase}, but the plan has {len(phases)}"
        raise UsageError(what, "run python train.py --dry-run to see the plan")
    phase = phases[config.phase - 1]
    runtime = build.open_runtime(config)
    out = make_directory(Path(config.out or config.save_dir))
    found = {
        "mode": config.mode,
        "phase": config.phase,
        "image_size": phase.image_size,
        "batch_size": phase.batch_size,
        "flags": flags.plain(config),
    }
    if config.mode == "accuracy":
        found |= try_rates(config, phase, geometric(low, high, config.trials))
    else:
        found |= measure(build.build(config, index, runtime, phases, out), phase, low, high, config)
    # --lr is the rate of the first phase, from which --lr-scale computes the one that was found.
    factor = build.lr_factor(config.lr_scale, phase, phases[0])
    write_results(found, out, lambda lr: training_command(argv, lr / factor))
    return 0


def rate_limits(config) -> tuple[float, float]:
    defaults = (1e-4, 0.1) if config.mode == "accuracy" else (1e-7, 10.0)
    low, high = config.start_lr or defaults[0], config.end_lr or defaults[1]
    if not low < high:
        raise UsageError(f"--start-lr {low:g} is not below --end-lr {high:g}", "give a lower --start-lr")
    return low, high


def make_directory(out: Path) -> Path:
    """Make the output directory before the test runs. Raises ResourceError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot write to {out}: {error.strerror}"
        raise ResourceError(what, "name a writable directory: --out") from None
    return out


def geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


# --- --mode loss ------------------------------------------------------------------------------------


def measure(run, phase, low: float, high: float, config) -> dict:
    """Return the losses of one range test in `phase`, and the rates they suggest."""
    from analysis.lr_suggestion import suggest
    from base.device import memory_for
    from base.progress import Progress
    from harness import build
    from loop import start_phase

    if config.init_from:
        build.load_init_from(run, config)
    batches, options = start_phase(run, phase)
    what = f"{phase.image_size} px, batch {phase.batch_size}"
    memory = memory_for(what, "split the batch: --accumulate 2", run.runtime.device)
    with memory, Progress(config.num_iter, f"lr {low:.0e} to {high:.0e} at {what}", unit="steps") as bar:
        lrs, losses, ended = range_test(run.state, options, batches, low, high, config.num_iter, bar.update)
    if len(losses) < MIN_STEPS:
        raise DivergedError(
            f"{ended} after {len(losses)} steps, from lr {low:.1e} on: too few for a curve",
            "start lower with --start-lr, or try --amp off",
        )
    suggestions = suggest(lrs, losses)
    found = {"suggestion": suggestions[HEADLINE], "suggestions": suggestions}
    return {**found, "lrs": lrs, "losses": losses, "ended": ended}


def range_test(state, options, batches, low: float, high: float, num_iter: int, after_step=None):
    """Take one training step at each of `num_iter` rates, which rise geometrically from `low` to `high`.

    Return the rates, the loss of each step, and why the test ended. The loss that diverged is kept; one that
    is not finite is not. The model, the optimizer and the scaler of `state` are restored bit for bit.
    """
    import matplotlib

    matplotlib.use("Agg")  # torch_lr_finder imports pyplot
    from torch_lr_finder.lr_finder import ExponentialLR, LRFinder, TrainDataLoaderIter

    from analysis.lr_suggestion import Divergence
    from ema import NoEMA
    from train_utils import train_step

    former, scaler = LRFinder(state.model, state.optimizer, criterion=None), state.scaler.state_dict()
    for group in state.optimizer.param_groups:
        group["lr"] = low
    test = replace(state, schedule=ExponentialLR(state.optimizer, high, num_iter), ema=NoEMA())
    test.model.train()
    batches = TrainDataLoaderIter(batches)  # starts again when the batches end
    rates, losses, diverged = [], [], Divergence()
    ended = "the highest rate was reached"
    try:
        for _ in range(num_iter):
            rate = test.optimizer.param_groups[0]["lr"]
            with warnings.catch_warnings():  # torch's about a schedule that steps while fp16 skips a step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                loss, _ = train_step(test, options, *next(batches))
            if test.bad_in_a_row:  # not if fp16 just lowered its scale: that loss is finite
                ended = "the loss was no longer finite"
                break
            rates.append(rate)
            losses.append(loss)
            if after_step:
                after_step(1, f"lr {rate:.1e}  loss {loss:.3f}")
            if diverged(loss):
                ended = "the loss diverged"
                break
    finally:
        former.reset()
        state.scaler.load_state_dict(scaler)
        state.optimizer.zero_grad(set_to_none=True)
    return rates, losses, ended


# --- --mode accuracy --------------------------------------------------------------------------------


def try_rates(config, phase, lrs: list[float]) -> dict:
    """Train briefly at each peak rate; return the losses and validation accuracies at the end."""
    from base.progress import Progress

    values, rows = trial_flags(config, phase), []
    title = f"--trial-epochs {config.trial_epochs} at {phase.image_size} px, batch {phase.batch_size}"
    with tempfile.TemporaryDirectory() as scratch, Progress(len(lrs), title, unit="trainings") as bar:
        for k, lr in enumerate(lrs):
            row = train(values | {"lr": lr, "save_dir": f"{scratch}/{k}"})
            rows.append(row)
            bar.update(1, f"lr {lr:.1e}  top-1 " + (f"{row['val_top1']:.2f} %" if row else "diverged"))
    trained = [k for k, row in enumerate(rows) if row and row["val_top1"] is not None]
    best = lrs[max(trained, key=lambda k: rows[k]["val_top1"])] if trained else None
    return {
        "suggestion": best,
        "suggestions": {"most accurate": best},
        "lrs": lrs,
        "losses": [row and row["val_loss"] for row in rows],
        "accuracies": [row and row["val_top1"] for row in rows],
        "ended": f"{len(lrs)} trainings, --trial-epochs {config.trial_epochs}",
    }


def trial_flags(config, phase) -> dict:
    """Return the flags of train.py for a short run of `phase` alone, without those left at their defaults."""
    values = {name: getattr(config, name) for name in flags.defaults()}
    values |= {
        "epochs": config.trial_epochs,
        "resize_schedule": (phase.image_size,),
        "batch_size": phase.batch_size,
        "phase_batch_sizes": None,
        "phase_epochs": None,
        "phase_mix": (phase.mix,),
        "lr_scale": "none",
        "config": "",
    }
    if config.schedule == "cosine":
        values["warmup_epochs"] = min(config.warmup_epochs, config.trial_epochs / 5)
    idle = flags.idle_flags(flags.make_config(values))  # such as flags about several phases
    defaults = flags.defaults()
    return {name: v for name, v in values.items() if name not in idle and v != defaults[name]}


def train(values: dict) -> dict | None:
    """Run train.py; return its last row, or None if it diverged. Raises UserError if it fails otherwise."""
    from harness.log import read_metrics

    command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags.to_argv(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == DivergedError.exit_code:
        return None
    if done.returncode:
        lines = (line.partition(": ") for line in done.stderr.splitlines())
        said = {start: text for start, _, text in lines if start in ("error", "fix")}
        error = UserError(
            f"the training at lr {values['lr']:.1e} failed: {said.get('error', done.stderr[-500:])}",
            said.get("fix", "try the same flags with train.py"),
        )
        error.exit_code = done.returncode
        raise error
    return read_metrics(values["save_dir"])[-1]


# --- what was found ---------------------------------------------------------------------------------


def write_results(found: dict, out: Path, command: Callable[[float], str]) -> None:
    """Print the suggestions with their command lines; write lr_finder.json and lr_finder.png."""
    from analysis import figures
    from base import files

    suggestions = {name: lr for name, lr in found["suggestions"].items() if lr is not None}
    found["commands"] = {name: command(lr) for name, lr in suggestions.items()}
    phase = f"phase {found['phase']}, {found['image_size']} px, batch {found['batch_size']}"
    print(f"{phase}: {found['ended']}, at lr {found['lrs'][-1]:.1e}")
    if not suggestions:
        print("WARNING: no suggestion, the loss did not fall; lower --start-lr, or raise --num-iter")
    for name, lr in sorted(suggestions.items(), key=lambda item: item[1] != found["suggestion"]):
        print(f"  {name:<14}{lr:.1e}   {found['commands'][name]}")
    files.write_json(out / "lr_finder.json", found)
    figures.save(draw(found, suggestions), out / "lr_finder.png")
    print(f"curve: {out / 'lr_finder.png'}, numbers: {out / 'lr_finder.json'}")


def training_command(argv: list[str] | None, lr: float) -> str:
    """Return the command line of train.py for `lr`: the one given here without the flags of this command."""
    own = flags.Parser(prog="lr_finder.py", add_help=False)
    flags.add_flags(own, "range test", FINDER)
    _, rest = own.parse_known_args(argv)
    return shlex.join(["python", "train.py", *rest, "--lr", f"{lr:.2g}"])


def draw(found: dict, suggestions: dict[str, float]):
    """Draw the measurements over the rate, with the suggestions marked."""
    from analysis import figures

    fig = figures.figure(7.5, 4.6)
    axis = figures.axes(fig, 1, 1)[0, 0]
    if found["mode"] == "accuracy":
        measured = found["ended"]
        draw_accuracies(axis, found["lrs"], found["accuracies"], figures)
    else:
        measured = "one step at each rate"
        draw_losses(axis, found["lrs"], found["losses"], figures)
    for k, (name, lr) in enumerate(suggestions.items()):
        axis.axvline(lr, **figures.line_style(k + 1), label=f"{name}: {lr:.1e}")
    phase = f"phase {found['phase']}: {found['image_size']} px, batch {found['batch_size']}"
    title = f"LR range test of {found['flags']['arch']}, {phase}\n{measured}"
    axis.set(xscale="log", xlabel="learning rate", title=title)
    axis.legend()
    return fig


def draw_losses(axis, lrs: list[float], losses: list[float], figures) -> None:
    from analysis.lr_suggestion import smooth

    curve = smooth(losses)
    axis.plot(lrs, losses, ".", color="0.6", markersize=4, label="loss of each step")
    axis.plot(lrs, curve, color=figures.BLUE, linewidth=2, label="smoothed")
    # An explosion at the end would flatten the rest into a line.
    fall = curve[0] - curve.min()
    top = curve[0] + max(0.6 * fall, 0.1 * abs(curve[0]))
    axis.set(ylabel="training loss", ylim=(min(curve.min(), *losses) - 0.1 * fall, top))


def draw_accuracies(axis, lrs: list[float], accuracies: list[float | None], figures) -> None:
    diverged = [lr for lr, accuracy in zip(lrs, accuracies, strict=True) if accuracy is None]
    heights = [math.nan if accuracy is None else accuracy for accuracy in accuracies]
    axis.plot(lrs, heights, "o-", color=figures.BLUE, label="validation top-1")
    if diverged:
        axis.plot(diverged, [0] * len(diverged), "x", color=figures.BLACK, label="diverged")
    axis.set(ylabel="validation top-1 (%)", ylim=(0, None))


if __name__ == "__main__":
    sys.exit(run_command(main))
