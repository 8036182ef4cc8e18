"""How far an hour of two CPU cores gets on CIFAR-10 and CIFAR-100, beside a plain loop in the same minutes.

`python -m benchmarks.headline cifar10 --data-dir data/cifar10 --out DIR` packs the data, trains with
recipes/cifar10_one_hour.yaml on all training images, and scores the test images once, after the last epoch.
Then benchmarks/plain_loop.py trains the same network for as many epochs as fit into the same time, at 32 px
with a usual learning rate, which was not tuned. Minutes are of the whole command: packing, start, loading,
evaluation; those of the plain loop begin after its imports. Logs go to DIR/headline/.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from base import errors, flags
from base.process import ROOT
from benchmarks.parity import start
from harness.log import read_metrics

DATASETS = ("cifar10", "cifar100")
WIDTH = 32  # of the ResNet-18 in both recipes


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.headline", description=__doc__.split("\n\n")[0])
    add, natural = parser.add_argument, flags.number(int, 0)
    add("dataset", choices=DATASETS, metavar="DATASET", help="cifar10 or cifar100.")
    add(
        "--data-dir", required=True, metavar="DIR", help="Its archive, or train/<class>/* and test/<class>/*."
    )
    add("--seed", type=natural, default=0, metavar="N", help="Random seed.")
    add("--no-plain-loop", action="store_true", help="Train the project only.")
    add("--out", default="benchmark-results", metavar="DIR", help="Rows go to DIR/headline.jsonl.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    errors.doing("training, then scoring")
    from benchmarks import records

    kept = records.finished(args.out, "headline")
    done = {row["row"]: row for row in records.load(args.out, "headline")} if kept else {}
    done = {name: row for name, row in done.items() if name in kept}
    name = f"{args.dataset}, seed {args.seed}, project"
    ours = done.get(name) or records.append(args.out, measure(name, args, project))
    print(shown(ours), flush=True)
    name = f"{args.dataset}, seed {args.seed}, plain loop"
    if not args.no_plain_loop:
        record = done.get(name) or measure(name, args, lambda args: plain_loop(args, ours["seconds"]))
        print(shown(record if name in done else records.append(args.out, record)))
    return 0


def measure(name: str, args, train) -> dict[str, object]:
    from benchmarks import records

    load, started, cpu = os.getloadavg()[0], time.perf_counter(), sum(os.times()[2:4])
    found = train(args)
    timing = {"seconds": round(time.perf_counter() - started, 1)}
    timing |= {"cpu_seconds": round(sum(os.times()[2:4]) - cpu, 1)}
    here = records.environment() | {"load": round(load, 1)}
    row = {"benchmark": "headline", "row": name, "dataset": args.dataset, "seed": args.seed}
    return row | {"loop": name.rpartition(", ")[2]} | timing | found | here


def project(args) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as work:
        packed, run = f"{work}/packed", f"{work}/run"
        data = ["--dataset", args.dataset, "--data-dir", str(Path(args.data_dir).resolve())]
        start([str(ROOT / "pack_dataset.py"), *data, "--stored-sides=32", "--raw-sides=32", "--out", packed])
        recipe = ROOT / "recipes" / f"{args.dataset}_one_hour.yaml"
        where = ["--data-dir", packed, "--save-dir", run, "--seed", str(args.seed)]
        start([str(ROOT / "train.py"), "--config", str(recipe), *where])
        log = Path(args.out) / "headline" / f"{args.dataset}-seed{args.seed}.metrics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f"{run}/metrics.jsonl", log)
        last = read_metrics(run)[-1]
    return {"epochs": last["epoch"], "val_top1": last["ema_val_top1"], "raw_val_top1": last["val_top1"]}


def plain_loop(args, seconds: float) -> dict[str, object]:
    command = ["-m", "benchmarks.plain_loop", str(Path(args.data_dir).resolve()), f"--width={WIDTH}"]
    command += ["--bf16", "--num-workers=1", f"--seed={args.seed}"]
    short = json.loads(start([*command, "--epochs=2"]).splitlines()[-1])
    one = short.pop("last_epoch_seconds")
    other = short["seconds"] - 2 * one  # listing, the first batches, scoring
    epochs, cpu = max(1, int((seconds - other) / one)), sum(os.times()[2:4])
    found = json.loads(start([*command, f"--epochs={epochs}"]).splitlines()[-1])
    return {"epochs": epochs, "cpu_seconds": round(sum(os.times()[2:4]) - cpu, 1)} | found


def shown(row: dict[str, object]) -> str:
    score = (
        f"{row['row']}: {row['val_top1']:.2f} %, {row['epochs']} epochs, {row['seconds'] / 60:.1f} minutes"
    )
    return f"{score}, commit {row['commit']}"


if __name__ == "__main__":
    sys.exit(errors.run(main))
