"""What one bit flipped in a run's memory does: how often it is noticed, and how it changes the score.

`python -m benchmarks.bitflips --out DIR` trains a small network on digits (fp32, one thread) and forks at
random steps. Each fork flips one random bit of one random element of the weights, the optimizer state, the
EMA weights or the BatchNorm statistics, trains to the end, and is compared with the run it came from.
`--table DIR` prints the tables of docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from base import errors, files, flags, process

KINDS = ("weights", "exp_avg", "exp_avg_sq", "average", "BatchNorm statistics")
BITS = {"sign": range(31, 32), "exponent": range(23, 31), "mantissa": range(23)}  # of a float32
WORSE = 1.0  # points of top-1
OUTCOMES = ("noticed", "same bits", "same score", "within 1 point", "worse", "better")
# With the small stem, the last stage has 2 x 2 pixels; at 1 x 1 most weights of 3 x 3 kernels are unused.
RUN = [
    *("--dataset", "digits", "--arch", "resnet_tiny", "--stem", "small", "--resize-schedule", "16"),
    *("--batch-size", "32", "--epochs", "5", "--lr", "1e-2", "--augment", "none"),
    *("--num-workers", "0", "--device", "cpu", "--amp", "off"),
]


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.bitflips", description=__doc__.split("\n\n")[0])
    add, positive, whole = parser.add_argument, flags.number(int, 1), flags.number(int, 0)
    points = "Flips, spread evenly over the five kinds of memory."
    add("--points", type=positive, default=200, metavar="N", help=points)
    add("--seed", type=whole, default=0, metavar="N", help="Random seed of the flips.")
    add("--jobs", type=positive, default=process.cores(), metavar="N", help="Simultaneous forks.")
    add("--out", default="bitflips", metavar="DIR", help="Output directory of bitflips.json.")
    add("--table", default="", metavar="DIR", help="Only print the tables of DIR/bitflips.json.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.table:
        print(tables(json.loads((Path(args.table) / "bitflips.json").read_text())))
        return 0
    errors.doing("loading torch")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result = measure(args.points, args.seed, args.jobs, out)
    files.write_json(out / "bitflips.json", result)
    print(tables(result))
    return 0


def measure(points: int, seed: int, jobs: int, out: Path) -> dict:
    """Train once, forking a process per point on the way, and compare how the runs end."""
    import torch

    import loop
    from harness import build
    from harness.log import MetricLogger
    from sources import layouts

    torch.set_num_threads(1)  # a fork has only the thread that forked
    config, _ = flags.parse(flags.build_parser("bitflips", "", groups=flags.TRAIN_GROUPS), RUN)
    index = layouts.open_dataset(**flags.data_args(config))
    runtime = build.open_runtime(config)
    run = build.build(config, index, runtime, build.make_plan(config, index, runtime.world_size), out)
    steps = sum(phase.steps for phase in run.phases)
    plan = random_points(points, steps, random.Random(seed))
    forks, error = Forks(plan, jobs, out), ""
    # Fork where a run would save, which is after every step; save and print nothing.
    hooks = {name: lambda *_: None for name in ("save", "name_best")}
    hooks["save_or_stop"] = forks.start
    with patch.multiple(loop, **hooks), patch.object(loop.Run, "say", lambda *_: None):
        try:
            loop.fit(run, MetricLogger(out, enabled=False))
        except BaseException as reason:
            if forks.own is None:
                raise
            error = type(reason).__name__
    ended = ending(run, error)
    if forks.own is not None:
        (out / f"{forks.own}.json").write_text(json.dumps(plan[forks.own] | ended))
        os._exit(0)  # the rest, and the caller, belong to the parent
    forks.wait_until_at_most(0)
    for i, point in enumerate(plan):
        file = out / f"{i}.json"
        point |= json.loads(file.read_text())
        point["outcome"] = outcome(point, ended)
        file.unlink()
    return {"undisturbed": ended, "steps": steps, "seed": seed, "points": plan}


def random_points(count: int, steps: int, rng: random.Random) -> list[dict]:
    points = []
    for i in range(count):
        point = {"kind": KINDS[i % len(KINDS)], "step": rng.randrange(1, steps)}
        points.append(point | {"where": rng.random(), "bit": rng.randrange(32)})
    return points


class Forks:
    """Forks of a run, one per point; each differs from the run in one bit."""

    def __init__(self, plan: list[dict], jobs: int, out: Path):
        self.plan, self.jobs, self.out, self.alive = plan, jobs, out, 0
        self.own: int | None = None  # the number of its point, in a fork

    def start(self, run) -> None:
        """Fork for each point of the step that was just taken."""
        for i, point in enumerate(self.plan):
            if self.own is None and point["step"] == run.state.step:
                self.wait_until_at_most(self.jobs - 1)
                self.alive += 1
                if os.fork() == 0:
                    self.own = i
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar is the parent's
                    point |= flip_one(run, point)

    def wait_until_at_most(self, alive: int) -> None:
        while self.alive > alive:
            os.wait()
            self.alive -= 1


def flip_one(run, point: dict) -> dict:
    """Flip the point's bit in the element that it names; return the values before and after."""
    tensors = memory(run, point["kind"])
    element = int(point["where"] * sum(tensor.numel() for tensor in tensors))
    for tensor in tensors:
        if element < tensor.numel():
            break
        element -= tensor.numel()
    before, after = flip(tensor, element, point["bit"])
    return {"before": repr(before), "after": repr(after)}  # JSON has no NaN


def memory(run, kind: str) -> list:
    """Return the float32 tensors of one kind, in the order of the model."""
    state = run.state
    if kind in ("exp_avg", "exp_avg_sq"):
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        return [state.optimizer.state[p][kind] for p in parameters]
    if kind == "average":
        return [t for t in state.ema.module.state_dict().values() if t.is_floating_point()]
    if kind == "weights":
        return list(state.model.parameters())
    return [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]


def flip(tensor, element: int, bit: int) -> tuple[float, float]:
    """Flip one bit of an element, counted in memory order; return its value before and after."""
    import torch

    storage = tensor.untyped_storage()
    floats, words = (torch.empty(0, dtype=dtype).set_(storage) for dtype in (torch.float32, torch.int32))
    element += tensor.storage_offset()  # a view of a buffer that holds other tensors, too
    before = floats[element].item()
    words[element] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    return before, floats[element].item()


def ending(run, error: str) -> dict:
    """Return how a run ended: its error, its score, the skipped steps, and a hash of its whole state."""
    state, rows = run.state.state_dict(), run.state.rows
    return {
        "error": error,
        "score": rows[-1][run.best_by] if rows else None,
        "bad_steps": sum(row["bad_steps"] for row in rows),
        "digest": bits([state[name] for name in ("model", "ema", "optimizer")]),
    }


def bits(value) -> str:
    """Return a hash that two values share only if they are the same bit for bit."""
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        content = "".join(map(bits, value)).encode()
    else:
        content = value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def outcome(point: dict, undisturbed: dict) -> str:
    if point["error"] or point["bad_steps"]:
        return "noticed"
    if point["digest"] == undisturbed["digest"]:
        return "same bits"
    change = point["score"] - undisturbed["score"]
    if change == 0:
        return "same score"
    if abs(change) <= WORSE:
        return "within 1 point"
    return "worse" if change < 0 else "better"


def tables(result: dict) -> str:
    """Return two tables in Markdown: by kind of memory and by kind of bit."""
    points, score = result["points"], result["undisturbed"]["score"]
    stopped = sum(bool(point["error"]) for point in points)
    skipped = sum(point["outcome"] == "noticed" for point in points) - stopped
    outcome = f"{stopped or 'none'} ended the run and {skipped or 'none'} were reported as skipped steps"
    lines = [f"{len(points)} flips in a run of {result['steps']} steps that ends at {score:.2f} %; {outcome}"]
    kind_of_bit = {bit: name for name, positions in BITS.items() for bit in positions}
    by_kind = Counter((point["kind"], point["outcome"]) for point in points)
    by_bit = Counter((kind_of_bit[point["bit"]], point["outcome"]) for point in points)
    for title, names, counts in (("in", KINDS, by_kind), ("bit", tuple(BITS), by_bit)):
        lines += ["", f"| {title} | flips | {' | '.join(OUTCOMES)} |", "|---" * (2 + len(OUTCOMES)) + "|"]
        for name in (*names, "all"):
            shown = names if name == "all" else (name,)
            row = [sum(counts[kind, outcome] for kind in shown) for outcome in OUTCOMES]
            lines.append(f"| {name} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
