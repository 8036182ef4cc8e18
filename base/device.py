"""Where a run happens: device, precision, ranks and seeds, each decided once.

Nothing else in the project asks which device it is on or how many ranks there are.
"""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class Runtime:
    """Device, precision and ranks of this process."""

    device: torch.device
    amp_dtype: torch.dtype | None = None  # None: plain fp32
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes files."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.amp_dtype]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` up across ranks, in place. A no-op on a single process."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: int) -> int:
        """The largest `flag` of all ranks, so that they act on it at the same step."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(flag, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def lost_ranks_named(runtime: Runtime) -> Iterator[None]:
    """Where one of many ranks ends, say so on that rank; and on the others, that they ended because of it.

    What only this rank can know of (its data, its memory) is marked, so that it is printed here.
    """
    own = runtime.rank or None  # the first rank prints anyway
    try:
        yield
    except (DataError, ResourceError) as error:
        error.rank = own
        raise
    except RuntimeError as error:
        if runtime.world_size == 1 or not any(word in str(error) for word in LOST_RANK):
            raise
        lost = ResourceError(
            f"another rank ended, or has been silent for {TIMEOUT}",
            "its own message says why; then start all ranks again with --resume auto",
        )
        lost.rank = own
        raise lost from error
    else:
        if runtime.world_size > 1:
            dist.destroy_process_group()


TIMEOUT = timedelta(minutes=5)
LOST_RANK = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
)


def init_runtime(device: str = "auto", amp: str = "auto", *, deterministic: bool = False) -> Runtime:
    """Read torchrun's variables, choose device and precision, join the process group.

    Raises ResourceError for a device that is not there, UsageError for a name that is none.
    """
    rank, world_size = process.rank(), process.world_size()
    chosen = _choose_device(device, process.local_rank(), ranks=world_size)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"rank {rank} of {world_size} cannot join the others: {str(error).splitlines()[0]}",
                "start all ranks through torchrun, every run on a port of its own",
            ) from error
    if deterministic:  # read when CUDA starts; without it cuBLAS refuses deterministic mode
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if (
        deterministic != torch.are_deterministic_algorithms_enabled()
    ):  # setting it imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
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
        if device.type not in ("cpu", "cuda", "mps"):  # torch knows more names than it can use
            raise RuntimeError
    except RuntimeError:
        raise UsageError(f"--device {name} is no device", "use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError(f"--device {name}: torch {torch.__version__} sees no usable GPU", gpu_hint())
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ResourceError(
                f"GPU {index} asked for, {torch.cuda.device_count()} there",
                "start as many ranks as there are GPUs",
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("--device mps: this torch has no Metal support", "use --device cpu")
    return device


def gpu_hint() -> str:
    return "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that torch is a CUDA build, or use --device cpu"


def unused_gpu(device: torch.device) -> str:
    """A warning where the machine has an NVIDIA GPU that torch cannot use; otherwise empty."""
    present = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    if device.type == "cuda" or not present or torch.cuda.is_available():
        return ""
    return (
        f"WARNING: this machine has an NVIDIA GPU but torch {torch.__version__} cannot use it: {gpu_hint()}"
    )


def _choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU", "use --amp bf16 or --amp off on a CPU")
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            amp = "bf16" if device.type == "cpu" and _cpu_has_bf16() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpu_has_bf16() -> bool:
    """Without these instructions bf16 on a CPU is emulated, slower than fp32."""
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


def seed_everything(*parts: int) -> None:
    """Seed torch, on CPU and GPU, from e.g. (seed, step, rank).

    SeedSequence mixes the parts. Sums and products collide: seed * step is 0 at step 0 whatever
    the seed, and seed + step makes neighbouring runs share their draws.
    """
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1))


def environment(runtime: Runtime) -> dict[str, object]:
    """What a reader needs to reproduce the run; no host, user or path names."""
    import platform

    gpu = runtime.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "device": torch.cuda.get_device_name(runtime.device) if gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "world_size": runtime.world_size,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


MIB = 2**20


def memory_words(device: torch.device) -> str:
    with suppress(RuntimeError):  # a GPU whose memory ran out may answer nothing
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return f"{free / MIB:,.0f} of {total / MIB:,.0f} MiB free"
    return f"on {device.type}"


@contextmanager
def memory_for(what: str, fix: str, device: torch.device) -> Iterator[None]:
    """Memory that runs out in here becomes a ResourceError that says for what."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory at {what} ({memory_words(device)})", fix) from error
