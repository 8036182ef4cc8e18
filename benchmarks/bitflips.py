"""One bit flipped in a run's memory: how often it is noticed, and how often the run ends in the same score.

`python -m benchmarks.bitflips --out DIR` trains a small network on digits (fp32, one thread) and forks at
random steps: each fork flips one random bit of one random element of the weights, of the optimizer's or
the average's or BatchNorm's memory, and trains to the end like the run it came from, which is what it is
compared with. `--table DIR` prints the tables of docs/reliability.md from DIR/bitflips.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from base import flags, process
from benchmarks.goodput import bits

KINDS = ("weights", "exp_avg", "exp_avg_sq", "average", "BatchNorm statistics")
BITS = {"sign": range(31, 32), "exponent": range(23, 31), "mantissa": range(23)}  # of a float32
WORSE = 1.0  # points of top-1
OUTCOMES = ("noticed", "same bits", "same score", "within 1 point", "worse", "better")
# The small stem leaves the last stage 2 x 2 pixels. At 1 x 1 a 3 x 3 kernel sees padding: most weights would do nothing.
RUN = [
    *(
        "--dataset",
        "digits",
        "--arch",
        "resnet_tiny",
        "--stem",
        "small",
        "--resize-schedule",
        "16",
        "--batch-size",
        "32",
    ),
    *(
        "--epochs",
        "5",
        "--lr",
        "1e-2",
        "--augment",
        "none",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--amp",
        "off",
    ),
]


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.bitflips", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    add(
        "--points",
        type=positive,
        default=200,
        metavar="N",
        help="flips, spread evenly over five kinds of memory",
    )
    add("--seed", type=flags.number(int, 0), default=0, metavar="N", help="of the flips")
    add("--jobs", type=positive, default=process.cores(), metavar="N", help="forks at a time")
    add("--out", default="bitflips", metavar="DIR", help="bitflips.json")
    add("--table", default="", metavar="DIR", help="print the tables of DIR/bitflips.json and leave")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.table:
        print(tables(json.loads((Path(args.table) / "bitflips.json").read_text())))
        return 0
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result = measure(args.points, args.seed, args.jobs, out)
    (out / "bitflips.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    return 0


def measure(points: int, seed: int, jobs: int, out: Path) -> dict:
    """Train once, with a fork for each point on the way, and compare how they end."""
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
    run.say = lambda text: None
    rng, steps = random.Random(seed), sum(phase.steps for phase in run.phases)
    plan = [
        {
            "kind": KINDS[i % len(KINDS)],
            "step": rng.randrange(1, steps),
            "where": rng.random(),
            "bit": rng.randrange(32),
        }
        for i in range(points)
    ]
    forks, between = Forks(plan, jobs, out), loop.Between.__call__

    def between_and_fork(self, *args):
        between(self, *args)
        forks.start_those_of(self.run)

    error = ""
    with (
        patch.object(loop, "save", lambda *_: None),
        patch.object(loop.Between, "__call__", between_and_fork),
    ):
        try:
            loop.fit(run, MetricLogger(out, enabled=False))
        except BaseException as reason:
            if forks.own is None:
                raise
            error = type(reason).__name__
    ended = ending(run, error)
    if forks.own is not None:
        (out / f"{forks.own}.json").write_text(json.dumps(plan[forks.own] | ended))
        os._exit(0)  # what follows, and what called this, is for the process that it was forked from
    forks.wait_until_only(0)
    for i, point in enumerate(plan):
        file = out / f"{i}.json"
        point |= json.loads(file.read_text())
        point["outcome"] = outcome(point, ended)
        file.unlink()
    return {"undisturbed": ended, "steps": steps, "seed": seed, "points": plan}


class Forks:
    """The points' processes: each is the run as it is at its step, but for one bit."""

    def __init__(self, plan: list[dict], jobs: int, out: Path):
        self.plan, self.jobs, self.out, self.alive = plan, jobs, out, 0
        self.own = None  # in a fork: its point

    def start_those_of(self, run) -> None:
        for i, point in enumerate(self.plan):
            if self.own is None and point["step"] == run.state.step:
                self.wait_until_only(self.jobs - 1)
                self.alive += 1
                if os.fork() == 0:
                    self.own = i
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the run's bar has one owner
                    point |= flip_one(run, point)

    def wait_until_only(self, alive: int) -> None:
        while self.alive > alive:
            os.wait()
            self.alive -= 1


def flip_one(run, point: dict) -> dict:
    """Flip the point's bit, all elements of its kind of memory being as likely; what was there, and is now."""
    tensors = memory(run, point["kind"])
    element = int(point["where"] * sum(t.numel() for t in tensors))
    for tensor in tensors:
        if element < tensor.numel():
            break
        element -= tensor.numel()
    before, after = flip(tensor, element, point["bit"])
    return {"before": repr(before), "after": repr(after)}  # JSON has no NaN


def memory(run, kind: str) -> list:
    """The float32 tensors of one kind, in their order in the model."""
    state = run.state
    if kind in ("exp_avg", "exp_avg_sq"):
        return [
            state.optimizer.state[p][kind] for group in state.optimizer.param_groups for p in group["params"]
        ]
    if kind == "average":
        return [t for t in state.ema.module.state_dict().values() if t.is_floating_point()]
    return (
        list(state.model.parameters())
        if kind == "weights"
        else [b for b in state.model.buffers() if b.is_floating_point()]
    )


def flip(tensor, element: int, bit: int) -> tuple[float, float]:
    """Flip one bit of one element, in the order of its memory; the value before and after."""
    import torch

    storage = tensor.untyped_storage()
    floats, words = (torch.empty(0, dtype=kind).set_(storage) for kind in (torch.float32, torch.int32))
    before = floats[element].item()
    words[element] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    return before, floats[element].item()


def ending(run, error: str) -> dict:
    """How a run ended: what stopped it, its score, the steps it passed over, and a hash of its whole state."""
    state, rows = run.state.state_dict(), run.state.rows
    return {
        "error": error,
        "score": rows[-1][run.judged_by] if rows else None,
        "bad_steps": sum(row["bad_steps"] for row in rows),
        "digest": bits([state[name] for name in ("model", "ema", "optimizer")]),
    }


def outcome(point: dict, undisturbed: dict) -> str:
    if point["error"] or point["bad_steps"]:
        return "noticed"
    if point["digest"] == undisturbed["digest"]:
        return "same bits"
    change = point["score"] - undisturbed["score"]
    return (
        "same score"
        if change == 0
        else "within 1 point"
        if abs(change) <= WORSE
        else "worse"
        if change < 0
        else "better"
    )


def tables(result: dict) -> str:
    """Two tables in Markdown: by kind of memory and by kind of bit."""
    points = result["points"]
    of_bit = {p["bit"]: name for p in points for name, bits in BITS.items() if p["bit"] in bits}
    by_kind, by_bit = (
        Counter((of(p), p["outcome"]) for p in points)
        for of in (lambda p: p["kind"], lambda p: of_bit[p["bit"]])
    )
    stopped = sum(bool(p["error"]) for p in points)
    lines = [
        f"{len(points)} flips in a run of {result['steps']} steps that ends at {result['undisturbed']['score']:.2f} %; of the "
        f"noticed ones {stopped} ended the run and {sum(p['outcome'] == 'noticed' for p in points) - stopped} were "
        "reported as steps passed over"
    ]
    for title, names, counts in (("in", KINDS, by_kind), ("bit", BITS, by_bit)):
        lines += ["", f"| {title} | flips | {' | '.join(OUTCOMES)} |", "|---" * (2 + len(OUTCOMES)) + "|"]
        for name in (*names, "all"):
            row = [sum(counts[n, o] for n in (names if name == "all" else [name])) for o in OUTCOMES]
            lines.append(f"| {name} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
