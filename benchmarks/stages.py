"""Where a loader worker's time goes: CPU microseconds per image for each stage of reading packed data.

`python -m benchmarks.stages --data-dir DIR` reads a packed dataset (pack_dataset.py). Each stage is
timed on its own over the same images, best of several passes; an operation that happens half of the
time counts half. "batch" is the whole of a worker's work, the hand-over to the main process apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from base import errors, flags

PASSES = 7
COUNT = 256


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.stages", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="a packed dataset")
    add(
        "--sizes",
        type=flags.number(int, 8),
        nargs="+",
        default=[64, 128, 224],
        metavar="PX",
        help="training sizes",
    )
    add("--json", default="stages.json", metavar="FILE", help="the rows")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import cv2
    import torch

    from sources.packed import open_packed

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    packed, rows = open_packed(args.data_dir), []
    for size in args.sizes:
        rows.append({"size": size, **stages(packed, size)})
    for name in rows[0]:
        print(f"{name:<28}" + "".join(f"{row[name]:>10,.0f}" for row in rows))
    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def stages(packed, size: int) -> dict[str, float]:
    """{stage: CPU microseconds per image} for training at `size` px."""
    import torch

    from dataloader import Batch, BatchDataset
    from sources import augment
    from sources.images import TrainTransform, decode

    split = packed.train.for_size(size)
    ids = np.random.default_rng(0).integers(0, len(split), COUNT)
    files = split.read(ids)
    pictures = [decode(data) for data in files]
    randomness = augment.KeyedRandom()
    draws = lambda: (randomness.rekey((0, 1, i)) for i in range(COUNT))  # noqa: E731
    boxes = [augment.random_resized_box(*p.shape[:2], d) for p, d in zip(pictures, draws(), strict=True)]
    crops = [augment.cut_and_resize(p, b, size) for p, b in zip(pictures, boxes, strict=True)]
    batch = np.empty((COUNT, size, size, 3), np.uint8)

    def operation(name: str) -> float:
        apply = augment.build(name, None, (124, 116, 104), randomness)
        plain = best(lambda: [draw() for draw in draws()])
        return best(lambda: [apply(crop, draw) for crop, draw in zip(crops, draws(), strict=True)]) - plain

    def fill() -> None:
        for k, crop in enumerate(crops):
            batch[k] = crop

    def whole(names: str) -> Callable:
        dataset = BatchDataset(split, TrainTransform(flags.parse_augment(names), size, packed.mean))
        return lambda: dataset[Batch(1, 0, ids)]

    return {
        "read from the shard": best(lambda: split.read(ids)),
        "decode": best(lambda: [decode(data) for data in files]),
        "random numbers": best(lambda: [draw() for draw in draws()]),
        "crop and resize": best(
            lambda: [augment.cut_and_resize(p, b, size) for p, b in zip(pictures, boxes, strict=True)]
        ),
        **{name: operation(name) for name in ("flip", "affine", "jitter", "dropout")},
        "copy into the batch": best(fill),
        "batch, crop and flip": best(whole("basic")),
        "batch, full augmentation": best(whole("full")),
        "hand-over (shared memory)": best(lambda: torch.from_numpy(batch.copy()).share_memory_()),
    }


def best(work: Callable) -> float:
    """CPU microseconds per image of `work`, which handles COUNT images."""
    shortest = float("inf")
    for _ in range(PASSES):
        started = time.process_time()
        work()
        shortest = min(shortest, time.process_time() - started)
    return shortest / COUNT * 1e6


if __name__ == "__main__":
    sys.exit(errors.run(main))
