"""The parts of `benchmarks.first_minute`: what each runs. A part is a process: `... first_minute_parts PART`.

Rows of the parts' own go to OUT/first_minute.jsonl; benchmarks.step and benchmarks.loader write theirs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import runpy
import statistics
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from base import errors, flags, process
from base.process import ROOT

GPU_FACTS = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu"
# px and batch size, beyond the documents'. A size ends with the first batch that does not fit.
LARGE = ((64, 1024), (128, 512), (224, 256), (64, 512), (128, 256), (224, 128), (64, 4096), (128, 1024))
LARGE += ((224, 512), (64, 8192), (128, 2048), (224, 1024))
TRAININGS = {  # their runs are named after the network
    # SGD with momentum at 0.1 for each 256 images is the usual choice for some 30 epochs of CIFAR.
    "cifar10": """--arch resnet34 --epochs 30 --stem small --head linear --resize-schedule 32
--phase-batch-sizes 512 --optimizer sgd --nesterov --lr 0.2 --weight-decay 5e-4 --clip-norm 0
--augment padcrop:4,flip,cutout:8 --mixup-alpha 0 --cutmix-alpha 0 --drop-path-rate 0 --no-ema""",
    "cifar100": "--arch resnet34 --config cifar100_resnet34 --cuda-graphs --eval-every 10",
    "tiny-imagenet": """--arch resnet50 --config tiny_imagenet --epochs 50 --phase-epochs 17,12,21
--resize-schedule 64,96,128 --phase-batch-sizes 256,256,256 --cuda-graphs --eval-every 5""",
}
SMALL = ("--arch", "resnet_tiny", "--batch-size", 8, "--num-workers", 0, "--device", "cpu")  # in a rehearsal
SHORT = """--arch resnet_tiny --epochs 3 --resize-schedule 16,24,32 --phase-epochs 1,1,1
--phase-batch-sizes 8,8,8 --no-cuda-graphs --eval-every 1 --num-workers 0 --device cpu"""  # likewise


@dataclass(frozen=True)
class Setting:
    """Where a part finds and leaves its files."""

    out: Path  # rows
    work: Path  # unpacked data, checkpoints
    data: Path  # archives of benchmarks.first_minute_data
    rehearse: bool = False

    def record(self, part: str, row: str, columns: dict) -> None:
        from benchmarks import records

        name = {"benchmark": "first_minute", "row": f"{part}: {row}", "part": part}
        records.append(self.out, name | columns | records.environment(device_name()))


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(*words: object) -> int:
    """Run `python WORDS` and return its exit code."""
    print("$ python", *words, flush=True)
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode


def must(*words: object) -> None:
    if code := run(*words):
        raise SystemExit(code)


# --- the machine -----------------------------------------------------------------------------------


def environment(s: Setting) -> None:
    """Versions, clocks, missing packages, and the two ceilings: arithmetic and memory traffic."""
    from base import device

    runtime = device.init_runtime("auto", "auto")
    found = {"missing": ", ".join(missing_packages())} | device.environment(runtime) | gpu_facts()
    found |= ceilings(runtime.device, s.rehearse)
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    s.record("environment", "environment", found)


def gpu_facts() -> dict[str, str]:
    """Return what nvidia-smi says about the first GPU; {} without one."""
    try:
        query = ["nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    names, values = GPU_FACTS.replace(".", "_").split(","), line.splitlines()[0].split(", ")
    return dict(zip(names, values, strict=True))


def missing_packages() -> list[str]:
    """Return the packages of requirements.txt that are not installed."""
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return [name for name in names if name.lower() not in installed]


def ceilings(device, rehearse: bool) -> dict[str, float]:
    """Return TFLOP/s of a bf16 matrix product and TB/s of a copy (bytes read and written)."""
    import torch
    from torch.utils.benchmark import Timer  # which warms up, and waits for the GPU

    n = 256 if rehearse else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.randn(n * n, device=device)
    names = {"a": a, "b": b, "source": source, "target": torch.empty_like(source)}
    product, copy = (Timer(code, globals=names).timeit(20).mean for code in ("a @ b", "target.copy_(source)"))
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "copy_tb_per_s": 8 * n * n / copy / 1e12}


# --- the tests ---------------------------------------------------------------------------------------


def gpu_tests(s: Setting) -> None:
    """`pytest -m gpu`: counts, and a row for each failure."""
    report = s.work / "gpu-tests.xml"
    report.unlink(missing_ok=True)
    options = ["-m", "gpu", "-v", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    marked = [path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    if importlib.util.find_spec("xdist"):  # eight at a time: most of a test is a CPU that starts or compiles
        options += ["-n", 8, "-p", "no:benchmark"]
    code = run("-m", "pytest", *options, f"--junitxml={report}", *sorted(marked))
    if not report.is_file():
        raise SystemExit(code or 1)
    outcomes = Counter(passed=0, failed=0, skipped=0)
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = any(part.tag == "skipped" for part in case)
        outcomes["failed" if problem is not None else "skipped" if skipped else "passed"] += 1
        if problem is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            s.record("gpu-tests", name, {"failed": 1, "message": (problem.get("message") or "")[:500]})
    s.record("gpu-tests", "all", dict(outcomes))


# --- the step and the loader ---------------------------------------------------------------------------


def step(s: Setting) -> None:
    """The documents' sizes: this project, bare and timm with their kernels; then variants of the project."""
    sizes = ["--sizes", 64, 128, 224, "--rounds", 5]
    variants = (["cuda-graphs"], ["compile"], ["fp32", "fp16", "nchw"])  # in order of value
    if s.rehearse:
        sizes = ["--sizes", 16, "--batch-sizes", 8, "--rounds", 2, "--arch", "resnet_tiny", "--device", "cpu"]
        variants = (["nchw"],)
    commands = ([], *(["--variants", *names] for names in variants))
    codes = [run("-m", "benchmarks.step", *sizes, *options, "--out", s.out) for options in commands]
    if any(codes):  # a variant that fails leaves the others
        raise SystemExit(max(codes))


def large_batches(s: Setting) -> None:
    """The same with ever larger batches, until the GPU's memory is full."""
    largest = ((16, 16),) if s.rehearse else LARGE
    options = ["--rounds", 2, "--arch", "resnet_tiny", "--device", "cpu"] if s.rehearse else ["--rounds", 3]
    full = set()
    for size, batch_size in largest:
        if size in full:
            continue
        words = ["--sizes", size, "--batch-sizes", batch_size, "--steps", 5, *options]
        code = run("-m", "benchmarks.step", *words, "--out", s.out)
        if code not in (0, errors.ResourceError.exit_code):
            raise SystemExit(code)
        if code:
            full.add(size)
            columns = {"size": size, "batch_size": batch_size, "fits": 0}
            s.record("large-batches", f"{size} px, batch {batch_size}", columns)


def loader(s: Setting) -> None:
    """This project's loader and its peers with the full augmentation: all cores first, then fewer."""
    words = ["--data-dir", unpacked(s, "photos"), "--out", s.out, "--work-dir", s.work / "loader"]
    options = ["--augmentations", "full", "--batches", 4, "--passes", 2]
    most = min(16, process.cores())
    counts = dict.fromkeys([most, 1, *(n for n in (8, 4, 2) if n < most)])
    if s.rehearse:
        counts, options = [1], ["--augmentations", "basic", "--batches", 1, "--passes", 1]
        options += ["--sizes", 16, "--stored-sides", 24]
    for workers in counts:
        must("-m", "benchmarks.loader", *words, "--workers", workers, *options)


def whole_run(s: Setting) -> None:
    """train.py from packed photographs: what loading, scoring and saving leave of the step's speed.

    The photographs are linked several times, so this measures speed and nothing else.
    """
    folders, packed = s.work / "whole-run" / "folders", s.work / "whole-run" / "packed"
    classes, images = (3, 60) if s.rehearse else (1000, 25_600)
    link_often(unpacked(s, "photos") / "train", folders, classes, images)
    sides = "24,36,48" if s.rehearse else "96,192,320"
    must("pack_dataset.py", "--data-dir", folders, "--out", packed, "--stored-sides", sides)
    plan = ["--data-dir", packed, "--epochs", 3, "--phase-epochs", "1,1,1"]
    workers = ["--num-workers", process.cores()]
    if s.rehearse:
        one_run(s, "defaults", [*plan, *SMALL, "--resize-schedule", "16,24,32", "--log-every", 2])
        return
    one_run(s, "defaults", [*plan, *workers])
    overnight = ["--config", "overnight", "--warmup-epochs", 1, "--log-every", 3]
    one_run(s, "recipe overnight", [*overnight, *plan, *workers], epochs=(30, 30, 30))
    one_run(s, "defaults, --cuda-graphs", [*plan, *workers, "--cuda-graphs"])


def one_run(s: Setting, name: str, words: list, epochs: tuple[int, ...] = (30, 20, 40)) -> None:
    """Train with the flags `words`; record the speed of each phase.

    epochs: of each phase when the recipe is trained whole, for an estimate of its hours
    """
    from harness.log import read_steps

    directory = s.work / "whole-run" / name.replace(" ", "-")
    must("train.py", *words, "--save-dir", directory, "--overwrite")
    steps: dict[tuple[int, int], list[dict]] = {}
    for row in read_steps(directory):
        steps.setdefault((row["image_size"], row["batch_size"]), []).append(row)
    for ((size, batch_size), rows), count in zip(steps.items(), epochs, strict=True):
        columns = {"run": name, "size": size, "batch_size": batch_size, "epochs_of_90": count}
        for column in ("images_per_second", "data_wait_percent"):
            columns[column] = statistics.median(row[column] for row in rows[1:])  # workers start in the first
        s.record("whole-run", f"{name}, {size} px", columns)


def link_often(source: Path, target: Path, classes: int, count: int) -> None:
    """Link the images of `source` as `count` of target/train, and two of each class as target/val."""
    paths = sorted(source.glob("*/*"))
    for k in range(count):
        path = paths[k % len(paths)]
        for split in ("train", "val")[: 1 + (k < 2 * classes)]:
            link = target / split / f"class{k % classes:04}" / f"{k}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path)


# --- reads that make the host wait ---------------------------------------------------------------------


def syncs(s: Setting) -> None:
    """Where the host waits for the GPU, per step: in the step alone, and in a whole run of train.py."""
    from base.device import init_runtime
    from benchmarks import step_loops

    arch, size, batch = ("resnet_tiny", 16, 8) if s.rehearse else ("resnet50", 64, 128)
    take_step = step_loops.project(step_loops.Setting(arch, size, batch, init_runtime("auto", "auto")))
    for _ in range(3):
        take_step()
    with synchronizations() as places:
        for _ in range(20):
            take_step()
    record_places(s, "step", places, steps=20)
    steps = 10 if s.rehearse else 100
    data = f"synthetic:classes=10,train={steps // 2 * batch},val={2 * batch},size={size}"
    words = ["--dataset", data, "--arch", arch, "--resize-schedule", size, "--batch-size", batch]
    words += ["--epochs", 2, "--num-workers", 2, "--save-dir", s.work / "syncs", "--overwrite"]
    sys.argv = ["train.py", *map(str, words)]
    with synchronizations() as places:
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    record_places(s, "train.py", places, steps)


def record_places(s: Setting, run: str, places: Counter, steps: int) -> None:
    for place, count in [*places.most_common(), ("all", places.total())]:
        print(f"{run}: {count:5} in {steps} steps: {place}", flush=True)
        columns = {"run": run, "place": place, "steps": steps, "count": count, "per_step": count / steps}
        s.record("syncs", f"{run}, {place}", columns)


@contextmanager
def synchronizations() -> Iterator[Counter]:
    """Count the synchronizing operations that torch warns of, by the line of this project they come from."""
    import torch

    places, gpu = Counter(), torch.cuda.is_available()

    def note(message, *_, **__) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[own_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if gpu:
                torch.cuda.set_sync_debug_mode("default")


def own_line() -> str:
    """Return the innermost line of this project on the stack, outside this file, as file:line function."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "elsewhere"


# --- trainings ---------------------------------------------------------------------------------------


def training(s: Setting, name: str) -> None:
    """Train with the flags of TRAININGS. A run that its time limit has stopped goes on."""
    words = TRAININGS[name].split()
    directory = s.work / name / words[words.index("--arch") + 1]
    words += SHORT.split() if s.rehearse else ["--num-workers", process.cores()]
    # A stopped run is saved in any case.
    words += ["--save-every", 1000, "--save-dir", directory, "--resume", "auto"]
    must("train.py", "--dataset", name, "--data-dir", unpacked(s, name), *words)


def unpacked(s: Setting, name: str) -> Path:
    from benchmarks import first_minute_data

    return first_minute_data.unpack(name, s.data, s.work)


PARTS: dict[str, Callable[[Setting], None]] = {
    "environment": environment,
    "gpu-tests": gpu_tests,
    "step": step,
    "syncs": syncs,
    "large-batches": large_batches,
    "loader": loader,
    "whole-run": whole_run,
    **{name: partial(training, name=name) for name in TRAININGS},
}


def main(argv: list[str] | None = None) -> int:
    parser = flags.Parser(prog="python -m benchmarks.first_minute_parts", description="Run one part.")
    parser.add_argument("part", choices=tuple(PARTS))
    for name in ("--out", "--work", "--data"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    values = vars(parser.parse_args(argv))
    PARTS[values.pop("part")](Setting(**values))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
