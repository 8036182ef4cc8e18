"""What a training step asks of torch and of the GPU: calls, host reads, kernels. Unlike times, exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

import train_utils
from benchmarks.step_loops import Setting, built

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # what a read of a tensor's value does
NO_WORK = ("aten::empty.memory_format", "aten::_local_scalar_dense")  # and views
COPIES = ("Memcpy", "Memset")


class Calls(TorchDispatchMode):
    """Counts the calls of ATen operators that compute, and the foreach calls on torch's slow path."""

    def __init__(self):
        super().__init__()
        self.calls = self.mixed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view and func.name() not in NO_WORK
        if func.name().startswith("aten::_foreach"):
            tensors = [t for arg in args if isinstance(arg, list) for t in arg if isinstance(t, torch.Tensor)]
            self.mixed += len({(t.dtype, t.device) for t in tensors}) > 1
        return func(*args, **(kwargs or {}))


def calls(step: Callable[[], object]) -> dict[str, int]:
    """Return the columns that count ATen calls, of one step."""
    with Calls() as counter:
        step()
    return {"aten_calls": counter.calls, "mixed_foreach_calls": counter.mixed}


def host_reads(setting: Setting) -> int:
    """Return 0 if the project's step never needs a tensor's value on the host, else 1 (or more).

    Two steps are taken with fake tensors, which have no values, so the first read raises.
    """
    state, options = built(setting)
    images, labels = setting.batch()
    images, targets = options.mixer(images, labels)  # it draws on the host, before the device has work
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for _ in range(2):  # the first one makes the optimizer's state
                train_utils.update(state, options, images, targets, vote=False)
        except DataDependentOutputException:
            return 1
    return 0


def gpu_activity(step: Callable[[], object], seconds_per_step: float, steps: int = 5) -> dict[str, float]:
    """Return the columns that torch's profiler counts on a GPU.

    seconds_per_step: measured without the profiler, which slows the host down, but not the kernels
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return activity(profiler.events(), seconds_per_step, steps)


def activity(events: Iterable, seconds_per_step: float, steps: int) -> dict[str, float]:
    """Return the columns of `gpu_activity` from the events of `steps` steps."""
    # The ranges of record_function, such as "Optimizer.step", appear among a GPU's events as well.
    events = [event for event in events if not event.is_user_annotation]
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    waits = [event for event in events if event.name in WAITS]
    busy = sum(event.time_range.elapsed_us() for event in on_gpu)
    return {
        "kernels": sum(not event.name.startswith(COPIES) for event in on_gpu) / steps,
        "launches": sum("Launch" in event.name and event.device_type == DeviceType.CPU for event in events)
        / steps,
        "copies": sum(event.name.startswith(COPIES) for event in on_gpu) / steps,
        "busy_percent": 100 * busy / steps / 1e6 / seconds_per_step,
        "waits": len(waits) / steps,
        "wait_milliseconds": sum(event.time_range.elapsed_us() for event in waits) / steps / 1e3,
    }
