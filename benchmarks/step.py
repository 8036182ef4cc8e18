"""What a training step costs: this project's beside a bare loop and timm's, in one run.

The batch is created once, on the device, so loading takes no part. The loops take turns, step by step on a
CPU and a few steps at a time on a GPU, so that a busy machine slows all of them alike: only ratios within one
run mean anything.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from base import files, flags, process
from base.errors import UsageError, UserError, run

EPILOG = """examples:
  python -m benchmarks.step --sizes 64 128 224 --json step.json      the documents' three phases
  python -m benchmarks.step --variants --json step.json              also one choice changed at a time
  python -m benchmarks.step --sizes 64 --batch-sizes 16 --rounds 9   minutes on a CPU"""
BATCH_SIZES = {64: 256, 128: 128, 224: 64}  # of the documents' phases
PROVENANCE = ("device", "cores", "threads", "torch", "cuda", "python")


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
    add("--rounds", type=positive, default=11, metavar="N", help="Timings of each loop; the median counts.")
    add("--steps", type=positive, metavar="N", help=steps)
    add("--variants", action="store_true", help="Also time the project's step with one choice changed.")
    add("--json", default="", metavar="FILE", help="Output file; the picture is saved beside it.")
    add("--debug", action="store_true", help="Show tracebacks of errors.")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    batch_sizes = args.batch_sizes or [BATCH_SIZES.get(size, max(1, 2**20 // size**2)) for size in args.sizes]
    if len(batch_sizes) != len(args.sizes):
        problem = f"{len(batch_sizes)} --batch-sizes for {len(args.sizes)} --sizes"
        raise UsageError(problem, "give one for each size")
    from base.device import environment, init_runtime

    runtime = init_runtime(args.device, args.amp)
    provenance = {name: value for name, value in environment(runtime).items() if name in PROVENANCE}
    provenance["commit"] = process.commit()
    provenance["command"] = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    print("{device}, {cores} cores, {threads} threads, torch {torch}".format(**provenance))
    print(HEADER, flush=True)
    rows = []
    for found in comparisons(args, batch_sizes, runtime):
        print("\n".join(map(table_row, found)), flush=True)
        rows += [row | provenance for row in found]
        if args.json:  # after each comparison: a failure must not lose hours of timing
            files.write_json(args.json, rows)
    if args.json:
        draw(rows, Path(args.json).with_suffix(".png"))
    return 0


def comparisons(args, batch_sizes: list[int], runtime) -> Iterator[list[dict]]:
    """Yield the rows of all loops, then of each variant that is available, for each image size."""
    from benchmarks.step_loops import LOOPS, Setting, project, variants

    for size, batch_size in zip(args.sizes, batch_sizes, strict=True):
        setting = Setting(args.arch, size, batch_size, runtime)
        yield compare({name: (loop, setting) for name, loop in LOOPS.items()}, args.rounds, args.steps)
        for name, changed in variants(setting).items() if args.variants else ():
            pair = {"project": (project, setting), name: (project, changed)}
            rows = compare(pair, args.rounds, args.steps)
            if len(rows) == 2:
                default, variant = rows
                names = {"loop": "project", "variant": name, "base_batch_size": batch_size}
                faster = variant["images_per_second"] / default["images_per_second"]
                yield [variant | names | {"times_faster_than_default": faster}]


def compare(loops: dict[str, tuple], rounds: int, steps: int | None) -> list[dict]:
    """Time the available ones of {name: (loop, setting)} in turns; return a row for each.

    On a busy machine, ratios of CPU time are more reliable than ratios of time.
    """
    made, memory = {}, {}
    for name, (loop, setting) in loops.items():
        device = setting.runtime.device
        try:
            made[name], memory[name] = warmed_up(lambda loop=loop, setting=setting: loop(setting), device)
        except (ImportError, UserError) as error:
            if name == "project":
                raise
            print(f"{name}: not available ({getattr(error, 'what', error)})", flush=True)
    timings = in_turns(made, rounds, steps or (20 if device.type == "cuda" else 1), device)
    seconds, cpu = ({n: statistics.median(t[k] for t in timings[n]) for n in made} for k in (0, 1))
    rows = []
    for name in made:
        setting = loops[name][1]
        row = {
            "size": setting.image_size,
            "batch_size": setting.batch_size,
            "arch": setting.arch,
            "loop": name,
            "variant": "",
            "precision": setting.runtime.precision,
            "milliseconds": 1000 * seconds[name],
            "cpu_milliseconds": 1000 * cpu[name],
            "timings": rounds,
            "images_per_second": setting.batch_size / seconds[name],
            "memory_mib": memory[name],
        }
        for other in {"bare", "timm"} & made.keys() - {name}:
            row[f"times_{other}"] = seconds[name] / seconds[other]
            row[f"cpu_times_{other}"] = cpu[name] / cpu[other]
        rows.append(row)
    return rows


def warmed_up(make: Callable[[], Callable], device) -> tuple[Callable, int | None]:
    """Make a loop and take three steps; return it with its peak memory in MiB (None except on a GPU)."""
    import torch

    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step = make()
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


HEADER = (
    f"{'px':>4} {'batch':>5}  {'loop':<18} {'':<10} {'ms':>9} {'CPU ms':>9} {'img/s':>9} {'x bare':>7} "
    f"{'x timm':>7} {'in CPU time':>13} {'MiB':>7}"
)


def table_row(row: dict) -> str:
    keys = ("times_bare", "times_timm", "cpu_times_bare", "cpu_times_timm")
    ratios = [f"{row[key]:.3f}" if key in row else "-" for key in keys]
    memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:,}"
    faster = row.get("times_faster_than_default")
    return (
        f"{row['size']:>4} {row['batch_size']:>5}  {row['loop']:<18} "
        f"{row['variant'] or row['precision']:<10} "
        f"{row['milliseconds']:>9.2f} {row['cpu_milliseconds']:>9.2f} {row['images_per_second']:>9,.1f} "
        f"{ratios[0]:>7} {ratios[1]:>7} {ratios[2]:>6} {ratios[3]:>6} {memory:>7}"
        + (f"  {faster:.2f}x the default" if faster else "")
    )


def draw(rows: list[dict], path: Path) -> None:
    """Draw the images per second of every loop and variant: a panel per size and batch size."""
    from analysis import figures

    groups: dict[tuple, list[dict]] = {}
    for row in reversed(rows):
        batch_size = row.get("base_batch_size", row["batch_size"])
        groups.setdefault((row["size"], batch_size), []).append(row)
    title = f"{rows[0]['arch']}, {rows[0]['precision']}, {rows[0]['device']}"
    figure = figures.figure(4.5 * len(groups), 4, title)
    axes = figures.axes(figure, 1, len(groups))[0]
    for axis, (size, batch_size) in zip(axes, sorted(groups), strict=True):
        shown = groups[size, batch_size]
        names = [row["loop"] + (f": {row['variant']}" if row["variant"] else "") for row in shown]
        colors = ["C1" if row["variant"] else "C0" for row in shown]
        bars = axis.barh(names, [row["images_per_second"] for row in shown], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=2)
        axis.margins(x=0.15)
        axis.set(title=f"{size} px, batch {batch_size}", xlabel="images / s")
    print(f"rows: {path.with_suffix('.json')}; picture: {figures.save(figure, path)}", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
