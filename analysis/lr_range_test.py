"""The measurements behind lr_finder.py: an LR range test, and short trainings at several rates.

Both return what `write_results` prints, draws and writes as JSON.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from analysis import figures
from analysis.lr_suggestion import Divergence, smooth, suggest
from base import errors, files, flags, process
from base.device import memory_for
from base.errors import DivergedError, UserError
from base.progress import Progress
from ema import NoEMA
from harness.interrupts import STOP_SIGNALS
from harness.log import read_metrics
from loop import Run, start_phase
from optim.schedule import set_lr
from train_utils import Phase, StepOptions, TrainState, train_step

HEADLINE = "valley"  # the suggestion that depends least on single losses


def geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


# --- --mode loss ------------------------------------------------------------------------------------


def measure(run: Run, phase: Phase, low: float, high: float, num_iter: int, min_steps: int) -> dict:
    """Return the losses of one range test in `phase`, and the rates they suggest.

    Raises DivergedError if the test ended before `min_steps`.
    """
    batches, options = start_phase(run, phase)
    what = f"{phase.image_size} px, batch {phase.batch_size}"
    memory = memory_for(what, f"split the batch: --accumulate {2 * options.accumulate}", run.runtime.device)
    with memory, Progress(num_iter, f"lr {low:.0e} to {high:.0e} at {what}", unit="steps") as bar:
        lrs, losses, ended = range_test(run.state, options, batches, low, high, num_iter, bar.update)
    if len(losses) < min_steps:
        raise DivergedError(
            f"{ended} after {len(losses)} steps, from lr {low:.1e} on: too few for a curve",
            "start lower with --start-lr, or try --amp off",
        )
    suggestions = suggest(lrs, losses)
    found = {"suggestion": suggestions[HEADLINE], "suggestions": suggestions}
    return {**found, "lrs": lrs, "losses": losses, "ended": ended}


def range_test(
    state: TrainState,
    options: StepOptions,
    batches: Iterable[tuple[Tensor, Tensor]],
    low: float,
    high: float,
    num_iter: int,
    after_step: Callable[[int, str], None] = lambda steps, words: None,
) -> tuple[list[float], list[float], str]:
    """Take one training step at each of `num_iter` rates, which rise geometrically from `low` to `high`.

    Return the rates, the loss of each step, and why the test ended. A loss that diverged is included, one
    that is not finite is not. The model, the optimizer and the scaler of `state` are restored bit for bit.
    """
    finder = errors.optional("torch_lr_finder.lr_finder", needed_for="lr_finder.py --mode loss")
    saved, scaler = finder.LRFinder(state.model, state.optimizer, criterion=None), state.scaler.state_dict()
    for group in state.optimizer.param_groups:
        group["lr"] = low  # where the finder's schedule starts
    test = replace(state, schedule=finder.ExponentialLR(state.optimizer, high, num_iter), ema=NoEMA())
    batches = finder.TrainDataLoaderIter(batches)  # starts again when the batches end
    rates, losses, diverged = [], [], Divergence()
    ended = "the highest rate was reached"
    try:
        for _ in range(num_iter):
            rate = test.optimizer.param_groups[0]["lr"]
            set_lr(test.optimizer, rate)
            with warnings.catch_warnings():  # torch warns if the schedule steps while fp16 skips a step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                result = train_step(test, options, *next(batches)).result()
            test.count(result)
            if test.bad_in_a_row:  # not if fp16 just lowered its scale: that loss is finite
                ended = "the loss was no longer finite"
                break
            rates.append(rate)
            losses.append(result.loss)
            after_step(1, f"lr {rate:.1e}  loss {result.loss:.3f}")
            if diverged(result.loss):
                ended = "the loss diverged"
                break
    finally:
        saved.reset()
        state.scaler.load_state_dict(scaler)
        state.optimizer.zero_grad(set_to_none=True)
    return rates, losses, ended


# --- --mode accuracy --------------------------------------------------------------------------------


def compare_trainings(values: dict, lrs: list[float], epochs: int) -> dict:
    """Run train.py at each peak rate; return the losses and the validation accuracies at the end.

    values: {flag of train.py: value} of every training; it lasts `epochs`
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is errors.exit_at_once:  # and leave its files behind
            signal.signal(number, _stop)
    rows = []
    title = f"{len(lrs)} runs of {epochs} epoch{'s' * (epochs > 1)}"
    with tempfile.TemporaryDirectory() as scratch, Progress(len(lrs), title, unit="runs") as bar:
        for k, lr in enumerate(lrs):
            row = train(values | {"lr": lr, "save_dir": f"{scratch}/{k}"})
            rows.append(row)
            shutil.rmtree(f"{scratch}/{k}", ignore_errors=True)  # its checkpoints may take a gigabyte
            bar.update(1, f"lr {lr:.1e}  top-1 " + (f"{row['val_top1']:.2f} %" if row else "diverged"))
    accuracies = [row and row["val_top1"] for row in rows]
    trained = [k for k, accuracy in enumerate(accuracies) if accuracy is not None]
    best = lrs[max(trained, key=accuracies.__getitem__)] if trained else None
    return {
        "suggestion": best,
        "suggestions": {"most accurate": best},
        "lrs": lrs,
        "losses": [row and row["val_loss"] for row in rows],
        "accuracies": accuracies,
        "ended": title,
    }


def _stop(number: int, frame) -> None:
    raise errors.Stopped(number)


def train(values: dict) -> dict | None:
    """Run train.py; return its last row, or None if it diverged. Raises UserError if it fails otherwise."""
    command = [sys.executable, str(process.ROOT / "train.py"), *flags.to_argv(values)]
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


# --- results ----------------------------------------------------------------------------------------

NONE_FOUND = {  # by mode
    "loss": "the loss did not fall; lower --start-lr, or raise --num-iter",
    "accuracy": "every run diverged; lower --start-lr and --end-lr",
}


def write_results(found: dict, out: Path) -> None:
    """Print the suggestions with their command lines; write lr_finder.json and lr_finder.png."""
    lrs, suggestions = found["lrs"], found["suggestions"]
    print(f"{title_of(found)}, lr {lrs[0]:.1e} to {lrs[-1]:.1e}: {found['ended']}")
    if not found["commands"]:
        print(f"WARNING: no suggestion: {NONE_FOUND[found['mode']]}")
    for name in sorted(found["commands"], key=lambda name: suggestions[name] != found["suggestion"]):
        print(f"  {name:<14}{suggestions[name]:.1e}   {found['commands'][name]}")
    path = files.write_json(out / "lr_finder.json", found)
    picture = figures.save(draw(found), out / "lr_finder.png")
    print(f"curve: {picture}, numbers: {path}")


def title_of(found: dict) -> str:
    return f"phase {found['phase']}, {found['image_size']} px, batch {found['batch_size']}"


def draw(found: dict) -> Figure:
    """Draw the measurements over the rate, with the suggestions marked."""
    fig = figures.figure(7.5, 4.6)
    axis = fig.subplots()
    if found["mode"] == "accuracy":
        measured = found["ended"]
        draw_accuracies(axis, found["lrs"], found["accuracies"])
    else:
        measured = "one step at each rate"
        draw_losses(axis, found["lrs"], found["losses"])
    for k, name in enumerate(found["commands"], 1):
        lr = found["suggestions"][name]
        axis.axvline(lr, **figures.line_style(k), label=f"{name}: {lr:.1e}")
    if not found["commands"]:
        measured += "; no suggestion: " + NONE_FOUND[found["mode"]].partition(";")[0]
    title = f"LR range test of {found['flags']['arch']}: {title_of(found)}\n{measured}"
    axis.set(xscale="log", xlabel="learning rate", title=title)
    axis.legend()
    return fig


def draw_losses(axis, lrs: list[float], losses: list[float]) -> None:
    curve = smooth(losses)
    axis.plot(lrs, losses, ".", color="0.6", markersize=4, label="loss of each step")
    axis.plot(lrs, curve, color=figures.BLUE, linewidth=2, label="smoothed")
    # An explosion at the end would flatten the rest into a line.
    fall = curve[0] - curve.min()
    top = curve[0] + (max(0.6 * fall, 0.1 * abs(curve[0])) or 0.1)  # data of one class have the loss 0
    axis.set(ylabel="training loss", ylim=(min(curve.min(), *losses) - 0.1 * fall, top))


def draw_accuracies(axis, lrs: list[float], accuracies: list[float | None]) -> None:
    diverged = [lr for lr, accuracy in zip(lrs, accuracies, strict=True) if accuracy is None]
    heights = [math.nan if accuracy is None else accuracy for accuracy in accuracies]
    axis.plot(lrs, heights, "o-", color=figures.BLUE, label="validation top-1")
    if diverged:
        axis.plot(diverged, [0] * len(diverged), "x", color=figures.BLACK, label="diverged")
    axis.set(ylabel="validation top-1 (%)", ylim=(0, None))
