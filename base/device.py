"""Where a run happens: its device, precision and ranks, chosen once; and its random seeds."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from base import process
from base.errors import DataError, ResourceError, UsageError, is_out_of_memory

MIB = 2**20
TIMEOUT = timedelta(minutes=5)  # how long a rank waits for the others
LOST_RANK = (  # in messages of RuntimeErrors
    "gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe", "imed out",
)  # fmt: skip
GPU_HINT = (
    "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES, and that torch is a CUDA build; or use --device cpu"
)


@dataclass(frozen=True)
class Runtime:
    """The device, precision and rank of this process."""

    device: torch.device
    amp_dtype: torch.dtype | None = None  # None: plain fp32
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        """Return "fp32", "bf16" or "fp16"."""
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.amp_dtype]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max_over_ranks(self, value: int) -> int:
        """Return the largest `value` of any rank, so that all ranks act on it at the same step."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def init_runtime(device: str = "auto", amp: str = "auto", *, deterministic: bool = False) -> Runtime:
    """Choose device and precision, and join the process group if torchrun started several ranks.

    device, amp: as --device and --amp
    Raises ResourceError for a device that is missing, UsageError for an unknown one or for fp16 on a CPU.
    """
    rank, world_size = process.rank(), process.world_size()
    try:
        chosen = _choose_device(device, process.local_rank(), world_size)
    except ResourceError as error:
        error.rank = rank or None  # each rank has a device of its own
        raise
    if world_size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"rank {rank} of {world_size} cannot join the others: {str(error).splitlines()[0]}",
                "start all ranks with torchrun, and give each run its own port",
            ) from error
    if deterministic:  # cuBLAS requires this before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports the compiler, which takes seconds
    if chosen.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
    return Runtime(chosen, _choose_precision(amp, chosen), rank, world_size)


def _choose_device(name: str, local_rank: int, ranks: int) -> torch.device:
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps and ranks == 1 else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # torch accepts names of devices it cannot use
            raise RuntimeError
    except RuntimeError:
        raise UsageError(f"--device {name} is unknown", "use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("--device mps: this torch has no Metal support", "use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ResourceError(f"--device {name}: torch {torch.__version__} finds no usable GPU", GPU_HINT)
    if device.index is not None and local_rank:  # one rank on each of several machines may name its GPU
        raise ResourceError(
            f"--device {name}: the ranks of a machine would share one GPU", "use --device cuda"
        )
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        what = f"GPU {index} does not exist: this machine has {count}"
        raise ResourceError(what, "start at most one rank per GPU, or name another --device")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU", "use --amp bf16 or --amp off on a CPU")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        # Without these instructions a CPU emulates bf16, which is slower than fp32.
        fast = any(name in _cpuinfo() for name in ("avx512_bf16", "amx_bf16"))
        amp = "bf16" if device.type == "cpu" and fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpuinfo() -> str:
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def unused_gpu(device: torch.device) -> str:
    """Return a warning if the machine has an NVIDIA GPU that torch cannot use, else ''."""
    present = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    if device.type == "cuda" or not present or torch.cuda.is_available():
        return ""
    return f"WARNING: this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: {GPU_HINT}"


def seed_everything(*parts: int) -> None:
    """Seed torch, on CPU and GPU, from parts such as (seed, step, rank).

    SeedSequence hashes them; trailing zeros do not count. A product would collide (seed * step is 0 at step 0
    for every seed), and with a sum, runs with neighbouring seeds would share their draws.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1)
    # Not `torch.manual_seed`: it keeps a stack trace for each kind of GPU that is not there, 30 us each.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def environment(runtime: Runtime) -> dict[str, object]:
    """Return the versions and hardware of this run, without names of hosts, users or paths."""
    gpu = runtime.device.type == "cuda"
    names = [
        line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "device": torch.cuda.get_device_name(runtime.device) if gpu else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "world_size": runtime.world_size,
        "platform": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def explain_lost_ranks(runtime: Runtime) -> Iterator[None]:
    """Turn the loss of another rank into a ResourceError; leave the process group at the end.

    Errors of data and resources, which may happen on this rank alone, are marked to be printed by it.
    """
    own = runtime.rank or None  # rank 0 prints its errors anyway
    try:
        yield
    except (DataError, ResourceError) as error:
        error.rank = own
        raise
    except RuntimeError as error:
        if runtime.world_size == 1 or not any(words in str(error) for words in LOST_RANK):
            raise
        lost = ResourceError(
            f"another rank ended, or did not answer for {TIMEOUT.seconds // 60} minutes "
            f"({str(error).splitlines()[0]})",
            "see its own message; then start all ranks again with --resume auto",
        )
        lost.rank = own
        raise lost from error
    else:
        if runtime.world_size > 1:
            dist.destroy_process_group()


@contextmanager
def memory_for(what: str, fix: str, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a ResourceError that says what the memory was needed for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory at {what} ({memory_words(device)})", fix) from error


def memory_words(device: torch.device) -> str:
    """Return how much memory the GPU has left, or which device it is, as text for a message."""
    with suppress(RuntimeError):  # a GPU that ran out of memory may not even answer
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return f"{free / MIB:,.0f} of {total / MIB:,.0f} MiB free"
    return f"on {device.type}"
