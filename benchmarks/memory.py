"""What 1.28 million file names cost: time and memory of indexing, and the memory of loader workers.

`python -m benchmarks.memory --json FILE` makes a tree of empty files in a temporary folder, indexes
it, and reads random samples from it for some epochs with real workers; then the same with the list
of (path, label) tuples that other loaders keep. The samples' bytes are one small JPEG: what is
measured is the bookkeeping. Linux only (/proc).
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

KINDS = ("index", "tuples")


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    add, positive = parser.add_argument, flags.number(int, 1)
    add(
        "--files",
        type=positive,
        nargs="+",
        default=[10_000, 1_281_167],
        metavar="N",
        help="sizes of the dataset",
    )
    add("--epochs", type=positive, default=4, metavar="N", help="of --samples random samples each")
    add("--samples", type=positive, default=20_000, metavar="N", help="per epoch")
    add("--workers", type=positive, default=2, metavar="N", help="loader processes")
    add("--json", default="memory.json", metavar="FILE", help="the rows")
    add("--child", default="", help="for its own use: measure this kind in this process")
    add("--tree", default="", help="for its own use: the files")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child, args.tree, args.epochs, args.samples, args.workers)))
        return 0
    rows = []
    print(
        f"{'files':>9} {'kept as':<7} {'list s':>6} {'CPU s':>6} {'index MB':>8}  private MB of one worker after each epoch"
    )
    for files in args.files:
        with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as tree:
            make_tree(tree, files)
            for kind in KINDS:  # each in a process of its own, whose memory is nobody else's
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.memory",
                    "--child",
                    kind,
                    "--tree",
                    tree,
                    "--epochs",
                    str(args.epochs),
                    "--samples",
                    str(args.samples),
                    "--workers",
                    str(args.workers),
                ]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rows.append({"files": files, "kept_as": kind, **row})
                print(
                    f"{files:>9,} {kind:<7} {row['seconds']:>6.1f} {row['cpu_seconds']:>6.1f} {row['index_mb']:>8.0f}  "
                    + " ".join(f"{mb:6.0f}" for mb in row["worker_mb"]),
                    flush=True,
                )
    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def make_tree(root: str, files: int, classes: int = 1000) -> None:
    """`files` empty files below `root`/train/<class>, named as ImageNet's are; one per class in val."""
    for c in range(classes):
        for part, names in (("train", range(c, files, classes)), ("val", range(1))):
            folder = os.path.join(root, part, f"n{c:08d}")
            os.makedirs(folder)
            for i in names:
                os.mknod(os.path.join(folder, f"n{c:08d}_{i}.JPEG"))


def measure(kind: str, tree: str, epochs: int, samples: int, workers: int) -> dict:
    """Seconds and megabytes of indexing `tree`, and the workers' mean private memory after each epoch."""
    import numpy as np
    import torch.utils.data

    import sources.folders
    from dataloader import BatchDataset, Order
    from sources.images import TrainTransform
    from sources.index import Split

    before, started = private_megabytes(os.getpid()), time.perf_counter()
    cpu_started = time.process_time()
    if kind == "index":
        listing = sources.folders.list_classes(tree, "train")
        split = listing.split(listing.classes)
        del listing
    else:
        split = Tuples(tree)
    seconds, index_mb = time.perf_counter() - started, private_megabytes(os.getpid()) - before
    cpu_seconds, image = time.process_time() - cpu_started, _small_jpeg()

    class Bookkeeping(Split):
        """Looks up what reading a sample looks up, and gives the same image for all."""

        labels = split.labels if kind == "index" else np.zeros(len(split), np.int64)

        def read(self, ids):
            return [image for i in ids if split.path(int(i))]

    class Draw(Order):
        def ids(self, epoch):
            return np.random.default_rng(epoch).integers(0, len(split), samples)

    dataset = BatchDataset(Bookkeeping(), TrainTransform((("rrc", None),), 32, (0.5, 0.5, 0.5)))
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=Draw(samples, 100),
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    worker_mb = []
    for _ in range(epochs):
        iterator = iter(loader)
        for batch in iterator:
            assert not isinstance(batch, Exception), batch
        pids = [process.pid for process in iterator._workers]
        worker_mb.append(round(sum(map(private_megabytes, pids)) / len(pids), 1))
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "index_mb": round(index_mb, 1),
        "worker_mb": worker_mb,
    }


class Tuples:
    """A million small Python objects, as torchvision's ImageFolder keeps them."""

    def __init__(self, tree: str):
        self.samples = [
            (os.path.join(folder, name), label)
            for label, (folder, _, names) in enumerate(sorted(os.walk(os.path.join(tree, "train")))[1:])
            for name in sorted(names)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, i: int) -> str:
        return self.samples[i][0]


def _small_jpeg() -> bytes:
    import cv2
    import numpy as np

    return cv2.imencode(".jpg", np.full((40, 40, 3), 128, np.uint8))[1].tobytes()


def private_megabytes(pid: int) -> float:
    """Memory of the process that is not shared with another, from /proc."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    sys.exit(errors.run(main))
