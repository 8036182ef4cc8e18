"""What a training step costs: this project's beside a bare loop and timm's, in one run.

The batch is created once, on the device, so loading takes no part. The loops take turns, step by step on a
CPU and a few steps at a time on a GPU, so that a busy machine slows all of them alike: only ratios within one
run mean anything. Counts of calls and kernels are exact on any machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

from base import flags
from base.errors import UsageError, UserError, doing, run

EPILOG = """examples:
  python -m benchmarks.step --sizes 64 128 224                       the documents' three phases
  python -m benchmarks.step --variants                               also one choice changed at a time
  python -m benchmarks.step --sizes 64 --batch-sizes 16 --rounds 9   minutes on a CPU"""
BATCH_SIZES = {64: 256, 128: 128, 224: 64}  # of the documents' phases


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.step", description=__doc__, epilog=EPILOG)
    add, positive, sizes = parser.add_argument, flags.positive, flags.number(int, 8, 4096)
    steps = "Steps per timing (default: 20 on a GPU, else 1)."
    precisions = ("auto", "bf16", "fp16", "off")
    add("--sizes", type=sizes, nargs="+", default=[64, 128, 224], metavar="PX", help="Image sizes.")
    add("--batch-sizes", type=positive, nargs="+", metavar="N", help="Batch size for each image size.")
    add("--arch", default="resnet50", choices=flags.ARCHS, help="Architecture.")
    add("--device", default="auto", help="Device: auto, cpu or cuda.")
    add("--amp", default="auto", choices=precisions, help="Mixed precision.")
    add("--rounds", type=positive, default=11, metavar="N", help="Timings of each loop.")
    add("--steps", type=positive, metavar="N", help=steps)
    chosen = "Also time the project's step with one choice changed: all such choices, or those named."
    add("--variants", nargs="*", metavar="NAME", help=chosen)
    add("--out", default="benchmark-results", metavar="DIR", help="Rows go to DIR/step.jsonl.")
    add("--table", action="store_true", help="Only print the table of --out.")
    add("--debug", action="store_true", help="Show tracebacks of errors.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    batch_sizes = args.batch_sizes or [BATCH_SIZES.get(size, max(1, 2**20 // size**2)) for size in args.sizes]
    if len(batch_sizes) != len(args.sizes):
        problem = f"{len(batch_sizes)} --batch-sizes for {len(args.sizes)} --sizes"
        raise UsageError(problem, "give one for each size")
    from benchmarks import records

    if not args.table:
        doing("loading torch")
        from base.device import init_runtime

        runtime = init_runtime(args.device, args.amp)
        done = records.finished(args.out, "step")
        for rows in comparisons(args, batch_sizes, runtime, done):
            for row in rows:  # after each comparison: a failure must not lose hours of timing
                records.append(args.out, row | records.environment(str(runtime.device)))
                print(records.line(row, COLUMNS), flush=True)
    print(records.table(records.load(args.out, "step"), COLUMNS))
    return 0


def comparisons(args, batch_sizes: list[int], runtime, done: set[str]) -> Iterator[list[dict]]:
    """Yield the rows of the loops one channel wide, then of all loops and variants for each image size."""
    import torch

    from base.device import Runtime
    from benchmarks.step_loops import LOOPS, Setting, project, variants
    from models.torchvision_zoo import ZOO

    def loops_of(setting: Setting, steps: int | None) -> Iterator[list[dict]]:
        if f"{setting.name}, project" not in done:
            loops = {name: (loop, setting) for name, loop in LOOPS.items()}
            yield compare(loops, args.rounds, steps, count=True)

    if args.arch not in ZOO:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for dtype in (None, torch.bfloat16):
            cpu = Runtime(torch.device("cpu"), dtype)
            yield from loops_of(Setting(args.arch, 64, 2, cpu, narrow=True), args.steps or 5)
        torch.set_num_threads(threads)
    for size, batch_size in zip(args.sizes, batch_sizes, strict=True):
        setting = Setting(args.arch, size, batch_size, runtime)
        yield from loops_of(setting, args.steps)
        for name, changed in variants(setting).items() if args.variants is not None else ():
            row = f"{setting.name}, project: {name}"
            if row in done or (args.variants and name not in args.variants):
                continue
            pair = {"project": (project, setting), name: (project, changed)}
            rows = compare(pair, args.rounds, args.steps)
            if len(rows) == 2:
                default, variant = rows
                names = {"row": row, "loop": "project", "variant": name, "base_batch_size": batch_size}
                faster = changed.batch_size / batch_size / variant["times_project"]
                beside = {"default_images_per_second": default["images_per_second"]}
                yield [variant | names | beside | {"times_faster_than_default": faster}]


# --- measuring ------------------------------------------------------------------------------------


def compare(loops: dict[str, tuple], rounds: int, steps: int | None, *, count: bool = False) -> list[dict]:
    """Time the available ones of {name: (loop, setting)} in turns; return a row for each.

    count: also count calls; kernels and waits are counted on any GPU
    """
    made, memory = {}, {}
    for name, (loop, setting) in loops.items():
        try:
            made[name], memory[name] = warmed_up(loop, setting)
        except (ImportError, UserError) as error:
            if name == "project":
                raise
            print(f"{name}: skipped ({getattr(error, 'what', error)})", flush=True)
    device = setting.runtime.device  # all loops of a comparison have the same
    timings = in_turns(made, rounds, steps or (20 if device.type == "cuda" else 1), device)
    rows = [row_of(name, loops[name][1], timings, memory[name]) for name in made]
    return [row | counts(row, loops[row["loop"]][1], made[row["loop"]], calls=count) for row in rows]


def row_of(name: str, setting, timings: dict[str, list[tuple]], memory: int | None) -> dict:
    """Return the row of loop `name` from the (seconds, CPU seconds) per step of all loops."""
    seconds, cpu = (list(column) for column in zip(*timings[name], strict=True))
    row = {
        "benchmark": "step",
        "row": f"{setting.name}, {name}",
        "arch": setting.arch,
        "narrow": setting.narrow,
        "size": setting.image_size,
        "batch_size": setting.batch_size,
        "precision": setting.runtime.precision,
        "loop": name,
        "variant": "",
        "timings": len(seconds),
        "milliseconds": 1000 * statistics.median(seconds),
        "cpu_milliseconds": 1000 * min(cpu),
        "cpu_milliseconds_median": 1000 * statistics.median(cpu),
        "images_per_second": setting.batch_size / statistics.median(seconds),
        "memory_mib": memory,
    }
    for other in ("bare", "timm", "project"):
        if other in timings and other != name:
            pairs = list(zip(timings[name], timings[other], strict=True))
            row[f"times_{other}"] = statistics.median(a[0] / b[0] for a, b in pairs)
            row[f"cpu_times_{other}"] = statistics.median(a[1] / b[1] for a, b in pairs)
    return row


def counts(row: dict, setting, step: Callable, *, calls: bool) -> dict:
    """Return the columns of a row that are counted rather than timed."""
    from benchmarks import step_counts

    found, on_cpu = step_counts.calls(step) if calls else {}, setting.runtime.device.type == "cpu"
    if calls and on_cpu and row["loop"] == "project":  # such as the row of width 1
        found["host_reads"] = step_counts.host_reads(setting)
    if setting.runtime.device.type == "cuda":
        found |= step_counts.gpu_activity(step, row["milliseconds"] / 1000)
    return found


def warmed_up(loop: Callable, setting) -> tuple[Callable, int | None]:
    """Make a loop and take three steps; return it with its peak memory in MiB (None except on a GPU)."""
    import torch

    device = setting.runtime.device
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step = loop(setting)
    for _ in range(3):
        step()
    return step, round((torch.cuda.max_memory_allocated(device) - before) / 2**20) if gpu else None


def in_turns(loops: dict[str, Callable], rounds: int, steps: int, device) -> dict[str, list[tuple]]:
    """Time each loop `rounds` times, in alternating order; return (seconds, CPU seconds) per step."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timings = {name: [] for name in loops}
    for k in range(rounds):
        for name in list(loops)[:: 1 if k % 2 == 0 else -1]:
            synchronize()
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loops[name]()
            synchronize()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            timings[name].append((seconds / steps, cpu_seconds / steps))
    return timings


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {  # heading -> (column, format)
    "ms": ("milliseconds", ",.2f"),
    "CPU ms": ("cpu_milliseconds", ",.2f"),
    "img/s": ("images_per_second", ",.0f"),
    "x bare": ("times_bare", ".3f"),
    "CPU": ("cpu_times_bare", ".3f"),
    "x timm": ("times_timm", ".3f"),
    "x default": ("times_faster_than_default", ".2f"),
    "calls": ("aten_calls", ","),
    "mixed": ("mixed_foreach_calls", ","),
    "reads": ("host_reads", ","),
    "kernels": ("kernels", ",.0f"),
    "busy %": ("busy_percent", ".0f"),
    "waits": ("waits", ".1f"),
    "MiB": ("memory_mib", ",.0f"),
}


if __name__ == "__main__":
    sys.exit(run(main))
