"""Does the project train as well as a plain loop? The same network, recipe and seeds, in pairs.

`python -m benchmarks.parity --data-dir data/cifar10 --out DIR` trains ResNet-18 of width 8 on CIFAR-10 with
train.py and with benchmarks/plain_loop.py, for each seed, and compares top-1 on the official test images
after the last epoch. A seed gives both the same initial weights; order and augmentation are their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import errors, flags
from base.errors import ResourceError
from base.process import ROOT
from benchmarks.tables import LOOPS, filled
from harness.log import read_metrics

EPOCHS = 3
SHARED = ["--batch-size=128", "--lr=0.1", "--width=8"]
RECIPE = """
    --dataset=cifar10 --arch=resnet18 --stem=small --head=linear --drop-path-rate=0 --resize-schedule=32
    --augment=padcrop:4,flip --mixup-alpha=0 --cutmix-alpha=0 --label-smoothing=0.1 --optimizer=sgd --nesterov
    --weight-decay=5e-4 --no-ema --device=cpu --amp=off --num-workers=0
"""  # of train.py; benchmarks/plain_loop.py has it in its code


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    data = "CIFAR-10: its archive, or train/<class>/* and test/<class>/*."
    add("--data-dir", required=True, metavar="DIR", help=data)
    add("--seeds", type=positive, default=12, metavar="N", help="Number of pairs.")
    add("--epochs", type=positive, default=EPOCHS, metavar="N", help="Epochs of each training.")
    add("--out", default="benchmark-results", metavar="DIR", help="Rows go to DIR/parity.jsonl.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    errors.doing(f"training {args.seeds} seeds with two loops each")
    from benchmarks import records

    done = {row["row"] for row in of_today(args)}
    for seed in range(args.seeds):
        for loop in LOOPS:
            row = f"seed {seed}, {loop}"
            if row in done:
                continue
            started, cpu = time.perf_counter(), sum(os.times()[2:4])
            shared = [*SHARED, f"--epochs={args.epochs}", f"--seed={seed}"]
            top1 = (project if loop == "project" else plain_loop)(args, shared)
            record = {"seed": seed, "loop": loop, "epochs": args.epochs, "val_top1": top1}
            record |= {"seconds": round(time.perf_counter() - started, 1)}
            record |= {"cpu_seconds": round(sum(os.times()[2:4]) - cpu, 1)}
            here = records.environment()
            records.append(args.out, {"benchmark": "parity", "row": row} | record | here)
            print(f"{row}: {top1:.2f} %, {record['seconds']:.0f} s", flush=True)
    print(filled("parity", of_today(args)))
    return 0


def of_today(args) -> list[dict]:
    """Return the rows of this commit and this number of epochs."""
    from benchmarks import records

    done = records.finished(args.out, "parity")
    rows = records.load(args.out, "parity") if done else []
    return [row for row in rows if row["row"] in done and row["epochs"] == args.epochs]


def project(args, shared: list[str]) -> float:
    """Train with train.py; return the last epoch's top-1 in percent."""
    with tempfile.TemporaryDirectory() as run:
        where = [f"--data-dir={Path(args.data_dir).resolve()}", f"--save-dir={run}"]
        start([str(ROOT / "train.py"), *RECIPE.split(), *shared, *where])
        return read_metrics(run)[-1]["val_top1"]


def plain_loop(args, shared: list[str]) -> float:
    output = start(["-m", "benchmarks.plain_loop", str(Path(args.data_dir).resolve()), *shared])
    return json.loads(output.splitlines()[-1])["val_top1"]


def start(command: list[str]) -> str:
    """Run a Python command in the repository's root; return what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ResourceError(f"{command[:2]} failed: {done.stderr.strip()[-500:]}", "run it by hand")
    return done.stdout


if __name__ == "__main__":
    sys.exit(errors.run(main))
