"""python -m benchmarks.step: the project's training step against a bare loop and timm's, in one run.

The batch is made once and lies on the device, so that loading has no part in it. The loops take
turns, step by step on a CPU and a few at a time on a GPU: a busy machine slows all of them alike,
and only ratios within one run are to be believed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from base import flags, process
from base.errors import UsageError, UserError, run

EPILOG = """examples:
  python -m benchmarks.step --sizes 64 128 224 --json step.json      the documents' three phases
  python -m benchmarks.step --variants --json step.json              and layout, precision, compile, BlurPool, batch
  python -m benchmarks.step --sizes 64 --batch-sizes 16 --rounds 9   minutes on a CPU"""
BATCHES = {64: 256, 128: 128, 224: 64}  # of the documents' phases


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.step", description=__doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--sizes",
        type=flags.number(int, 8, 4096),
        nargs="+",
        default=[64, 128, 224],
        metavar="PX",
        help="image sizes",
    )
    add("--batch-sizes", type=flags.positive, nargs="+", default=None, metavar="N", help="one for each size")
    add("--arch", default="resnet50", choices=flags.ARCHS, help="architecture (default: resnet50)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision")
    add(
        "--rounds",
        type=flags.positive,
        default=11,
        metavar="N",
        help="timings of each loop; the median counts",
    )
    add(
        "--steps",
        type=flags.positive,
        default=None,
        metavar="N",
        help="steps a timing (default: 1; on a GPU 20)",
    )
    add("--variants", action="store_true", help="the project's step with one choice changed, as well")
    add("--json", default="", metavar="FILE", help="write the rows there, and a picture beside them")
    add("--debug", action="store_true", help="tracebacks for errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    batches = args.batch_sizes or [BATCHES.get(size, max(1, 2**20 // size**2)) for size in args.sizes]
    if len(batches) != len(args.sizes):
        raise UsageError(
            f"{len(batches)} --batch-sizes for {len(args.sizes)} --sizes", "give one for each size"
        )
    from base.device import environment, init_runtime
    from benchmarks.step_loops import Setting

    runtime = init_runtime(args.device, args.amp)
    rates = device_rates(runtime)
    facts = environment(runtime)
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, {runtime.precision}: "
        f"{rates['bandwidth'] / 1e9:,.1f} GB/s, {rates['matrix'] / 1e12:,.2f} TFLOP/s measured",
        flush=True,
    )
    rows = []
    for size, batch in zip(args.sizes, batches, strict=True):
        setting = Setting(args.arch, size, batch)
        loops = ["bare", "project", "project, no EMA", "project, no guard", "timm"]
        compared = [compare(setting, runtime, args, rates, loops)]
        for more in chain(compared, compare_variants(setting, runtime, args, rates) if args.variants else ()):
            rows += [row | {"command": command(argv), **provenance(facts)} for row in more]
            if args.json:  # as they come: hours of measuring are not to be lost to the last variant
                write(Path(args.json), rows)
    if args.json:
        picture(rows, Path(args.json).with_suffix(".png"))
        print(f"rows: {args.json}; picture: {Path(args.json).with_suffix('.png')}", flush=True)
    return 0


def command(argv: list[str] | None) -> str:
    return " ".join(["python -m benchmarks.step", *(sys.argv[1:] if argv is None else argv)])


def provenance(facts: dict) -> dict:
    return {"commit": process.commit()} | {
        k: facts[k] for k in ("device", "cores", "threads", "torch", "cuda", "python")
    }


def device_rates(runtime) -> dict[str, float]:
    import torch

    from benchmarks.device_rates import bandwidth, matrix_rate

    return {
        "bandwidth": bandwidth(runtime.device),
        "matrix": matrix_rate(runtime.device, runtime.amp_dtype or torch.float32),
    }


def compare(setting, runtime, args, rates, names: list[str]) -> list[dict]:
    """The rows of one setting: every loop that can be made, timed in turns."""
    from benchmarks.step_loops import LOOPS

    loops, memory = {}, {}
    for name in names:
        try:
            loops[name], memory[name] = warmed_up(
                lambda name=name: LOOPS[name](setting, runtime), runtime.device
            )
        except ImportError as error:
            print(f"{name}: not here ({error})", flush=True)
    seconds = in_turns(
        loops, args.rounds, args.steps or (20 if runtime.device.type == "cuda" else 1), runtime.device
    )
    demand = demands(setting, runtime)
    rows = [row(setting, runtime, name, "", seconds, memory[name], demand, rates) for name in loops]
    print(table(rows), flush=True)
    return rows


def compare_variants(setting, runtime, args, rates) -> Iterator[list[dict]]:
    """The row of every variant that can be made, the project's step as it is taking turns with each."""
    from benchmarks.step_loops import project, variants

    for variant, (changed, where) in variants(setting, runtime).items():
        loops, memory = {}, {}
        try:
            for name, (how, there) in {"project": (setting, runtime), variant: (changed, where)}.items():
                loops[name], memory[name] = warmed_up(
                    lambda how=how, there=there: project(how, there), runtime.device
                )
        except (ImportError, UserError) as error:
            print(f"{variant}: not here ({getattr(error, 'what', error)})", flush=True)
            continue
        seconds = in_turns(
            loops, args.rounds, args.steps or (20 if runtime.device.type == "cuda" else 1), runtime.device
        )
        result = row(
            changed, where, variant, variant, seconds, memory[variant], demands(changed, where), rates
        )
        per_image = [
            median_of(seconds[name]) / how.batch_size
            for name, how in (("project", setting), (variant, changed))
        ]
        result |= {
            "loop": "project",
            "base_batch_size": setting.batch_size,
            "times_faster_than_default": per_image[0] / per_image[1],
        }
        print(table([result]), flush=True)
        yield [result]


def warmed_up(make, device) -> tuple:
    """A loop after three steps, and the MiB it added at its peak (None where the device cannot say)."""
    import torch

    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step = make()
    for _ in range(3):
        step()
    return step, round((torch.cuda.max_memory_allocated(device) - before) / 2**20) if gpu else None


def in_turns(loops: dict, rounds: int, steps: int, device) -> dict[str, list[tuple[float, float]]]:
    """(Seconds, CPU seconds of this process) per step of every loop, `rounds` timings; every other round goes backwards."""
    import time

    from benchmarks.device_rates import synchronize

    seconds = {name: [] for name in loops}
    for k in range(rounds):
        for name in list(loops)[:: 1 if k % 2 == 0 else -1]:
            synchronize(device)
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loops[name]()
            synchronize(device)
            seconds[name].append(
                ((time.perf_counter() - started) / steps, (time.process_time() - cpu) / steps)
            )
    return seconds


def demands(setting, runtime) -> dict[str, float]:
    """Bytes and operations that the setting's step asks for, per image."""
    import torch

    from benchmarks.device_rates import step_flops, step_traffic
    from models import build_model

    def make():
        return build_model(setting.arch, num_classes=1000, use_blurpool=setting.use_blurpool)

    dtype = runtime.amp_dtype or torch.float32
    return {
        "bytes": step_traffic(make, setting.image_size, setting.batch_size, dtype),
        "flops": step_flops(make(), setting.image_size),
    }


def row(setting, runtime, name: str, variant: str, seconds: dict, memory, demand: dict, rates: dict) -> dict:
    """One row of the result; ratios are of medians taken in the same turns.

    On a CPU that others keep busy, a ratio of CPU time says more than one of time.
    """
    median = median_of(seconds[name])
    rate = setting.batch_size / median
    result = {
        "size": setting.image_size,
        "batch_size": setting.batch_size,
        "arch": setting.arch,
        "loop": name,
        "variant": variant,
        "precision": runtime.precision,
        "milliseconds": 1000 * median,
        "cpu_milliseconds": 1000 * median_of(seconds[name], 1),
        "timings": len(seconds[name]),
        "images_per_second": rate,
        "memory_mib": memory,
        "fraction_of_bandwidth": rate * demand["bytes"] / rates["bandwidth"],
        "fraction_of_matrix_rate": rate * demand["flops"] / rates["matrix"],
    }
    for other in ("bare", "timm"):
        if other in seconds and name != other:
            result[f"times_{other}"] = median / median_of(seconds[other])
            result[f"cpu_times_{other}"] = median_of(seconds[name], 1) / median_of(seconds[other], 1)
    return result


def median_of(timings: list[tuple[float, float]], which: int = 0) -> float:
    return statistics.median(timing[which] for timing in timings)


def table(rows: list[dict]) -> str:
    lines = [
        f"{'px':>4} {'batch':>5}  {'loop':<18} {'':<10} {'ms':>9} {'CPU ms':>9} {'img/s':>9} {'x bare':>7} "
        f"{'x timm':>7} {'in CPU time':>13} {'MiB':>7} {'bandwidth':>9} {'matrix':>7}"
    ]
    for r in rows:
        keys = ("times_bare", "times_timm", "cpu_times_bare", "cpu_times_timm")
        ratios = [f"{r[key]:.3f}" if key in r else "-" for key in keys]
        memory = "-" if r["memory_mib"] is None else f"{r['memory_mib']:,}"
        faster = r.get("times_faster_than_default")
        lines.append(
            f"{r['size']:>4} {r['batch_size']:>5}  {r['loop']:<18} {r['variant'] or r['precision']:<10} "
            f"{r['milliseconds']:>9.2f} {r['cpu_milliseconds']:>9.2f} {r['images_per_second']:>9,.1f} "
            f"{ratios[0]:>7} {ratios[1]:>7} {ratios[2]:>6} {ratios[3]:>6} {memory:>7} {r['fraction_of_bandwidth']:>9.0%} "
            f"{r['fraction_of_matrix_rate']:>7.0%}" + (f"  {faster:.2f}x the default" if faster else "")
        )
    return "\n".join(lines)


def write(path: Path, rows: list[dict]) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def picture(rows: list[dict], path: Path) -> None:
    """Images a second of every loop and variant, a panel for each size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["size"], r.get("base_batch_size", r["batch_size"])), []).insert(0, r)
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(4.5 * len(groups), 4), squeeze=False, layout="constrained"
    )
    for ((size, batch), here), panel in zip(groups.items(), panels[0], strict=True):
        names = [r["loop"] + (f": {r['variant']}" if r["variant"] else "") for r in here]
        bars = panel.barh(
            names,
            [r["images_per_second"] for r in here],
            color=["C1" if r["variant"] else "C0" for r in here],
        )
        panel.bar_label(bars, fmt="{:,.0f}", padding=2)
        panel.margins(x=0.15)
        panel.set(title=f"{size} px, batch {batch}", xlabel="images / s")
    figure.suptitle(f"{rows[0]['arch']}, {rows[0]['precision']}, {rows[0]['device']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
