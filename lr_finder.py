"""Which learning rate? Range tests with train.py's own flags, data, loss, mixing, clipping and precision.

--mode loss      raise the rate at every step until the loss diverges (https://arxiv.org/abs/1506.01186)
--mode accuracy  train briefly at each of a few peak rates and compare validation accuracy

Nothing is approximated: torch-lr-finder brings the loop, the rates and the way back, but every step
it takes is `train_utils.train_step`, the one that training takes. Only the schedule is replaced, by
the rising rate, and no average of the weights is kept. What is trained here is thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from base import flags, process
from base.errors import DivergedError, ResourceError, UsageError, UserError, run

EPILOG = """examples:
  python lr_finder.py --data-dir ./data/imagenet              phase 1: 64 px, batch 256
  python lr_finder.py --phase 3 --num-iter 400 --out out      the last phase, in finer steps
  python lr_finder.py --config recipes/digits.yaml --mode accuracy --trials 6 --trial-epochs 2"""
FEWEST = 10  # losses below which there is no curve to read
HEADLINE = "valley"  # of the three suggestions, the one that depends least on single losses


def add_finder_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("range test").add_argument
    add("--mode", default="loss", choices=("loss", "accuracy"), help="what is measured at each rate")
    add(
        "--phase",
        type=flags.positive,
        default=1,
        metavar="K",
        help="image size, batch and mixing of this phase",
    )
    add("--num-iter", type=flags.number(int, FEWEST), default=200, metavar="N", help="steps of --mode loss")
    add(
        "--start-lr",
        type=flags.above_zero,
        default=None,
        metavar="LR",
        help="lowest rate; default 1e-7, accuracy 1e-4",
    )
    add(
        "--end-lr",
        type=flags.above_zero,
        default=None,
        metavar="LR",
        help="highest rate; default 10, accuracy 0.1",
    )
    add("--trials", type=flags.number(int, 2), default=7, metavar="N", help="trainings of --mode accuracy")
    add("--trial-epochs", type=flags.positive, default=2, metavar="N", help="epochs of each of them")
    add("--out", default="", metavar="DIR", help="for lr_finder.png and lr_finder.json; default: --save-dir")


def add_shared_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--save-dir", default="./checkpoints", metavar="DIR", help="where the run will live")
    add("--config", default="", metavar="FILE", help="YAML of flag defaults; the command line wins")
    add("--debug", action="store_true", help="tracebacks for errors")


OWN = (
    flags.Flag(
        "num_iter",
        "trace",
        idle=lambda c: c.mode == "accuracy" and "--mode accuracy counts --trials and --trial-epochs",
    ),
    flags.Flag("trials", "trace", idle=lambda c: c.mode == "loss" and "it needs --mode accuracy"),
    flags.Flag("trial_epochs", "trace", idle=lambda c: c.mode == "loss" and "it needs --mode accuracy"),
)

TRAINING = (
    flags.add_data_args,
    flags.add_model_args,
    flags.add_phase_args,
    flags.add_optim_args,
    flags.add_device_args,
)


def build_parser() -> flags.Parser:
    return flags.build_parser(
        "lr_finder.py",
        "Find a learning rate for a run, with that run's own flags.",
        EPILOG,
        (add_finder_args, *TRAINING, add_shared_args),
    )


def main(argv: list[str] | None = None) -> int:
    config, typed = flags.parse(build_parser(), argv)
    low, high = rate_limits(config)
    # The parts below may ask for any of train.py's flags; those that are no flags here have their defaults.
    config = flags.make_config({**flags.defaults(), **flags.plain(config)})
    if "lr" in typed.by_hand:  # a recipe may bring it
        raise UsageError("--lr would do nothing: it is what is looked for", "leave --lr out")
    notes = flags.refuse_idle(OWN, config, typed) + flags.check_train(config, typed)
    if process.world_size() > 1:
        raise UsageError("a range test runs on one device", "start it with python, not with torchrun")
    from sources import layouts

    index = layouts.index(**flags.data_args(config))
    for note in filter(None, (*notes, *index.notes, flags.workers_note(config.num_workers))):
        print(note, flush=True)
    from harness import build

    phases = build.make_plan(config, index, world_size=1)
    if config.phase > len(phases):
        raise UsageError(
            f"--phase {config.phase}, but the plan has {len(phases)}", "python train.py --dry-run shows it"
        )
    phase = phases[config.phase - 1]
    runtime = build.open_runtime(config)
    out = writable(Path(config.out or config.save_dir))
    facts = {
        "mode": config.mode,
        "phase": config.phase,
        "image_size": phase.image_size,
        "batch_size": phase.batch_size,
        "flags": flags.plain(config),
    }
    # What is found is the rate of this phase; --lr is that of the first, which --lr-scale turns into this one.
    factor = build.lr_factor(config.lr_scale, phase, phases[0])
    if config.mode == "accuracy":
        found = try_rates(config, phase, geometric(low, high, config.trials))
    else:
        found = measure(config, index, runtime, phases, phase, low, high)
    report(facts | found, out, lambda lr: training_command(argv, lr / factor))
    return 0


def rate_limits(config) -> tuple[float, float]:
    defaults = (1e-4, 0.1) if config.mode == "accuracy" else (1e-7, 10.0)
    low, high = (
        given or default for given, default in zip((config.start_lr, config.end_lr), defaults, strict=True)
    )
    if not low < high:
        raise UsageError(
            f"--start-lr {low:g} is not below --end-lr {high:g}", "give the lower rate as --start-lr"
        )
    return low, high


def geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


def writable(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write to {out}: {error.strerror}", "name a writable directory: --out"
        ) from None
    return out


def training_command(argv: list[str] | None, lr: float) -> str:
    """The train.py command line for `lr`: what was typed here, less what is only known here."""
    own = flags.Parser(prog="lr_finder.py", add_help=False)
    add_finder_args(own)
    _, rest = own.parse_known_args(argv)
    return shlex.join(["python", "train.py", *rest, "--lr", f"{lr:.2g}"])


def measure(config, index, runtime, phases, phase, low: float, high: float) -> dict:
    """--mode loss: the curve of one rising test and what it suggests."""
    from analysis.lr_curve import suggest
    from base.device import memory_for
    from base.progress import Progress
    from harness import build

    state = build.build_state(config, index, runtime, phases)
    if config.init_from:
        build.take_weights(config.init_from, state.model, config.reset_head)
    how = build.build_step(config, index, runtime, phase, state.model, state.model)
    batches = build.build_loader(config, index, runtime, phase)
    title = f"lr {low:.0e} to {high:.0e} at {phase.image_size} px, batch {phase.batch_size}"
    memory = memory_for(
        f"{phase.image_size} px, batch {phase.batch_size}", "split it: --accumulate 2", runtime.device
    )
    with memory, Progress(config.num_iter, title, unit="steps") as bar:
        lrs, losses, ended = range_test(state, how, batches, low, high, config.num_iter, bar.update)
    if len(losses) < FEWEST:
        raise DivergedError(
            f"{ended} after {len(losses)} steps, at lr {low:.1e}: there is no curve to read",
            "start lower with --start-lr, or try --amp off",
        )
    suggestions = suggest(lrs, losses)
    return {
        "suggestion": suggestions[HEADLINE],
        "suggestions": suggestions,
        "lrs": lrs,
        "losses": losses,
        "ended": ended,
    }


def range_test(state, how, batches, low: float, high: float, num_iter: int, after_step=lambda n, words: None):
    """One training step at each of `num_iter` rates from `low` to `high`: (rates, raw losses, why it ended).

    state: a TrainState; its model, optimizer and scaler come back as they were, bit for bit
    how:   the train_utils.Step to take; batches: an iterable of (images, labels), begun anew when it ends
    The loss that ended the test is kept if it is finite; a step that is not finite changes nothing.
    """
    import matplotlib

    matplotlib.use("Agg")  # the library imports pyplot
    from torch_lr_finder import lr_finder as library

    from analysis.lr_curve import Divergence
    from ema import NoEMA
    from train_utils import train_step

    rates, losses, diverged = [], [], Divergence()
    probe = replace(state, schedule=SimpleNamespace(step=lambda: None), ema=NoEMA())

    class Finder(library.LRFinder):  # inside a function: the class it extends takes seconds to import
        """The library's rates, loop and way back around our own step."""

        def _train_batch(self, train_iter, *unused, **also_unused):
            probe.model.train()
            rate = probe.optimizer.param_groups[0]["lr"]
            loss, _ = train_step(probe, how, *next(train_iter))
            if probe.bad_in_a_row:  # a loss is finite where fp16 only lowers its scale
                raise Ended("the loss was no longer finite")
            rates.append(rate)
            losses.append(loss)
            after_step(1, f"lr {rate:.1e}  loss {loss:.3f}")
            if diverged(loss):
                raise Ended("the loss diverged")
            return loss

    scaler = state.scaler.state_dict()
    finder = Finder(state.model, state.optimizer, criterion=None)
    library.tqdm = iter  # its bar cannot be switched off, and is none in a log file
    ended = "the highest rate was reached"
    try:
        # Its messages name a method to call. The scheduler's warning is about fp16, which may skip a step.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            finder.range_test(
                library.TrainDataLoaderIter(batches),
                start_lr=low,
                end_lr=high,
                num_iter=num_iter,
                smooth_f=0,
                diverge_th=math.inf,
            )
    except Ended as reason:
        ended = str(reason)
    finally:
        finder.reset()
        state.scaler.load_state_dict(scaler)
        state.optimizer.zero_grad(set_to_none=True)
    return rates, losses, ended


class Ended(Exception):
    """Ends the library's loop, which knows no NaN."""


def try_rates(config, phase, lrs: list[float]) -> dict:
    """--mode accuracy: a short training by train.py at each peak rate, and the validation accuracy of its end."""
    from base.progress import Progress

    accuracies, losses = [], []
    title = f"--trial-epochs {config.trial_epochs} at {phase.image_size} px, batch {phase.batch_size}"
    with tempfile.TemporaryDirectory() as scratch, Progress(len(lrs), title, unit="trainings") as bar:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(trial_recipe(config, phase), encoding="utf-8")
        for k, lr in enumerate(lrs):
            row = trial(recipe, lr, Path(scratch) / str(k))
            accuracies.append(row and row["val_top1"])
            losses.append(row and row["val_loss"])
            bar.update(
                1, f"lr {lr:.1e}  top-1 " + ("diverged" if row is None else f"{row['val_top1']:.2f} %")
            )
    reached = [(accuracy, -k) for k, accuracy in enumerate(accuracies) if accuracy is not None]
    best = lrs[-max(reached)[1]] if reached else None
    return {
        "suggestion": best,
        "suggestions": {"most accurate": best},
        "lrs": lrs,
        "losses": losses,
        "accuracies": accuracies,
        "ended": f"{len(lrs)} trainings, --trial-epochs {config.trial_epochs}",
    }


def trial_recipe(config, phase) -> str:
    """The run's flags as a recipe for one short phase of it."""
    import yaml

    defaults = flags.defaults()
    values = {name: value for name, value in flags.plain(config).items() if name in defaults}
    values |= {
        "epochs": config.trial_epochs,
        "resize_schedule": [phase.image_size],
        "batch_size": phase.batch_size,
        "phase_batch_sizes": None,
        "phase_epochs": None,
        "phase_mix": [phase.mix],
        "warmup_epochs": None,
        "config": None,
        "save_dir": None,
        "lr_scale": "none",
    }
    if config.schedule == "cosine":
        values["warmup_epochs"] = min(config.warmup_epochs, config.trial_epochs / 5)
    standard = flags.plain(flags.make_config(defaults))
    values = {name: value for name, value in values.items() if value is not None and value != standard[name]}
    trial = flags.make_config(defaults | values)
    idle = {
        row.name for row in flags.TABLE if flags.why_idle(row, trial)
    }  # in one phase, what served several
    if "phase_mix" in values:
        values["phase_mix"] = "on" if phase.mix else "off"
    return yaml.safe_dump({name: value for name, value in values.items() if name not in idle})


def trial(recipe: Path, lr: float, run_dir: Path) -> dict | None:
    """The last row of one training; None where it diverged."""
    from harness.log import read_metrics

    script = Path(__file__).with_name("train.py")
    command = [
        sys.executable,
        str(script),
        "--config",
        str(recipe),
        "--lr",
        repr(lr),
        "--save-dir",
        str(run_dir),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == DivergedError.exit_code:
        return None
    if done.returncode:
        said = dict(
            line.split(": ", 1) for line in done.stderr.splitlines() if line.startswith(("error: ", "fix: "))
        )
        error = UserError(
            f"the training at lr {lr:.1e} failed: {said.get('error', done.stderr[-500:])}",
            said.get("fix", "try the same flags with train.py"),
        )
        error.exit_code = done.returncode
        raise error
    return read_metrics(run_dir)[-1]


def report(found: dict, out: Path, command: Callable[[float], str]) -> None:
    """Print the suggestions with their command lines; write lr_finder.json and lr_finder.png."""
    from analysis import figures
    from base import files

    known = {name: lr for name, lr in found["suggestions"].items() if lr is not None}
    found = found | {"commands": {name: command(lr) for name, lr in known.items()}}
    print(
        f"phase {found['phase']}, {found['image_size']} px, batch {found['batch_size']}: {found['ended']}, "
        f"at lr {found['lrs'][-1]:.1e}"
    )
    if not known:
        print(
            "WARNING: no suggestion, the loss did not fall; start lower with --start-lr, or give more --num-iter"
        )
    for name in sorted(known, key=lambda name: known[name] != found["suggestion"]):
        print(f"  {name:<14}{known[name]:.1e}   {found['commands'][name]}")
    files.write(out / "lr_finder.json", files.json_text(found))
    figures.save(draw(found, known), out / "lr_finder.png")
    print(f"curve: {out / 'lr_finder.png'}, numbers: {out / 'lr_finder.json'}")


def draw(found: dict, suggestions: dict[str, float]):
    """The curve over the rate, with the suggestions marked."""
    from analysis import figures

    made = figures.figure(7.5, 4.6)
    axis = figures.axes(made, 1, 1)[0, 0]
    (draw_accuracy if found["mode"] == "accuracy" else draw_loss)(axis, found, figures)
    for k, (name, lr) in enumerate(suggestions.items()):
        axis.axvline(lr, **figures.line_style(k + 1), label=f"{name}: {lr:.1e}")
    what = {"loss": "one step at each rate", "accuracy": found["ended"]}[found["mode"]]
    axis.set(
        xscale="log",
        xlabel="learning rate",
        title=f"LR range test of {found['flags']['arch']}, phase "
        f"{found['phase']}: {found['image_size']} px, batch {found['batch_size']}\n{what}",
    )
    axis.legend()
    return made


def draw_loss(axis, found: dict, figures) -> None:
    from analysis.lr_curve import smooth

    curve = smooth(found["losses"])
    axis.plot(found["lrs"], found["losses"], ".", color="0.6", markersize=4, label="loss of each step")
    axis.plot(found["lrs"], curve, color=figures.BLUE, linewidth=2, label="smoothed")
    # An explosion at the end would press all that matters into a line.
    span = curve[0] - curve.min()
    axis.set_ylim(
        min(curve.min(), *found["losses"]) - 0.1 * span, curve[0] + max(0.6 * span, 0.1 * abs(curve[0]))
    )
    axis.set_ylabel("training loss")


def draw_accuracy(axis, found: dict, figures) -> None:
    trained = [
        (lr, accuracy)
        for lr, accuracy in zip(found["lrs"], found["accuracies"], strict=True)
        if accuracy is not None
    ]
    lost = [lr for lr, accuracy in zip(found["lrs"], found["accuracies"], strict=True) if accuracy is None]
    axis.plot(
        *zip(*trained, strict=True) if trained else ([], []),
        "o-",
        color=figures.BLUE,
        label="validation top-1",
    )
    axis.plot(lost, [0] * len(lost), "x", color=figures.BLACK, label="diverged" if lost else "_")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("validation top-1 (%)")


if __name__ == "__main__":
    sys.exit(run(main))
