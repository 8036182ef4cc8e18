"""What is counted while an epoch is trained."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from base.progress import Progress, duration
from dataloader import Loader
from harness.log import MetricLogger
from train_utils import Phase, RunningStep, StepResult


class Meter:
    """Counts the steps of an epoch: adds up its row, moves the progress bar, reports bad steps.

    A step is counted while the device takes the next one, so that the device never waits for that.
    """

    def __init__(self, run: Any, phase: Phase, epoch: int, loader: Loader, log: MetricLogger):
        """`run` is a `loop.Run`."""
        self.run, self.phase, self.epoch, self.loader, self.log = run, phase, epoch, loader, log
        self.clock, self.waited, self.bad_images = time.perf_counter(), 0.0, 0  # at the last step
        self.images, self.seconds, self.steps, self.overflows = 0, 0.0, 0, 0  # since the start
        self.running: deque[tuple[RunningStep, int]] = deque()  # steps not counted yet, and their images
        title = f"{epoch:>3}/{run.epochs} {phase.image_size} px"
        done = run.state.step - phase.step_before(epoch)
        self.bar = Progress(
            phase.steps_per_epoch, title, unit="steps", initial=done, enabled=run.runtime.is_main
        )

    def __enter__(self) -> Meter:
        self.run.read_steps = self.read  # for `save`: a checkpoint includes the counts of all its steps
        return self

    def __exit__(self, *exception) -> None:
        self.run.read_steps = lambda: False
        self.bar.close()
        if self.overflows and exception[0] is None:
            self.run.say(
                f"note: {self.overflows} steps of epoch {self.epoch} overflowed in fp16 and were skipped; "
                f"the scale is now {self.run.state.scaler.get_scale():g}"
            )

    def add(self, step: RunningStep, images: int) -> bool:
        """Note a step of `images` images, over all ranks, that was just launched; count the one before it.

        Return whether a rank voted in that one. Raises DivergedError.
        """
        self.running.append((step, images))
        return self.read(running=1)

    def read(self, running: int = 0) -> bool:
        """Count all steps but the newest `running`; return whether a rank voted in one of them."""
        voted = False
        while len(self.running) > running:
            step, images = self.running.popleft()
            result = step.result()
            self.count(result, images)
            voted |= result.votes > 0
        return voted

    def count(self, result: StepResult, images: int) -> None:
        run, sums, now = self.run, self.run.state.epoch_sums, time.perf_counter()
        if result.finite:
            sums["loss"] += result.loss * images
            sums["images"] += images
        else:
            sums["bad_steps"] += 1
            self.report_bad_step(result)
        seconds, self.clock = now - self.clock, now
        waited = self.loader.waited - self.waited
        self.log_step(result, images, seconds, waited)
        sums["seconds"] += seconds
        sums["waited"] += waited
        sums["bad_images"] += len(self.loader.bad) - self.bad_images
        self.waited, self.bad_images = self.loader.waited, len(self.loader.bad)
        if self.steps == 1:  # the first step also waited for workers to start, or for torch.compile
            self.images, self.seconds = 0, 0.0
        self.steps += 1
        self.images, self.seconds = self.images + images, self.seconds + seconds
        run.eta.observe_training(self.phase, self.images, self.seconds)
        left = duration(run.eta.remaining(run.state.step, len(run.state.rows)))
        self.bar.update(
            1,
            f"{left} left  loss {sums['loss'] / max(1, sums['images']):.3f}  "
            f"{self.images / self.seconds:,.0f} img/s  wait {100 * sums['waited'] / sums['seconds']:.0f}%  "
            f"lr {run.state.schedule.last_lr:.1e}",
        )
        run.state.count(result)  # last, because it raises DivergedError

    def log_step(self, result: StepResult, images: int, seconds: float, waited: float) -> None:
        state, phase, step = self.run.state, self.phase, result.step + 1
        row = {
            "step": step,
            "epoch": self.epoch,
            "image_size": phase.image_size,
            "batch_size": phase.batch_size,
            "lr": state.schedule.lr_at(result.step),
            "loss_scale": result.scale if state.scaler.is_enabled() else None,
        }
        last = step == phase.first_step + phase.steps
        spent = {"images": images, "seconds": seconds, "waited": waited}
        self.log.steps.add(state.row_sums, row, result, last=last, **spent)

    def report_bad_step(self, result: StepResult) -> None:
        if result.overflowed:  # in fp16: not the fault of these images
            self.overflows += 1
            return
        first = (result.step - self.phase.step_before(self.epoch)) * self.phase.batch_size
        ids = self.loader.order.ids(self.epoch)[first : first + self.phase.batch_size]
        names = listed([self.run.index.train.name(int(i)) for i in ids[:9]])
        what = f"step {result.step + 1} was not finite and was skipped; its {len(ids)} images: {names}"
        self.run.say(f"WARNING: {what}")


def listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
