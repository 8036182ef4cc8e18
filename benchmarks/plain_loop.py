"""A plain training loop of torch and torchvision: what the project is compared with.

`python -m benchmarks.plain_loop DATA` trains on DATA/train/<class>/*, or on an archive of CIFAR in DATA. It
scores DATA/val, DATA/test or the archive's test images once, at the end. Network, loss, optimizer, schedule
and clipping are those of the project's flags with these names; loading, augmentation, order, loop and
evaluation are as anyone would write them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from base import errors, flags

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="python -m benchmarks.plain_loop", description=__doc__.split("\n\n")[0])
    add, positive, rate = parser.add_argument, flags.number(int, 1), flags.number(float, 0, open_low=True)
    add("data", metavar="DATA", help="Directory of CIFAR, or with train/<class>/* and val/ or test/.")
    add("--epochs", type=positive, default=3, metavar="N", help="Epochs.")
    add("--batch-size", type=positive, default=128, metavar="N", help="Batch size.")
    add("--lr", type=rate, default=0.1, metavar="LR", help="Peak of OneCycleLR.")
    add("--width", type=positive, default=8, metavar="N", help="Width of the ResNet-18.")
    add("--seed", type=flags.number(int, 0), default=0, metavar="N", help="Random seed.")
    add("--bf16", action="store_true", help="Autocast to bfloat16.")
    add("--num-workers", type=flags.number(int, 0), default=0, metavar="N", help="Loader processes.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    errors.doing("loading torch")
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from models import build_model

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    fill = tuple(round(255 * value) for value in MEAN)
    crop, flip = transforms.RandomCrop(32, padding=4, fill=fill), transforms.RandomHorizontalFlip()
    pixels = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    train, val = read(Path(args.data), transforms.Compose([crop, flip, *pixels]), transforms.Compose(pixels))
    loader = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
    )  # fmt: skip
    model = build_model(
        "resnet18", num_classes=len(train.classes), head="linear", stem="small", width=args.width
    ).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * len(loader), cycle_momentum=False
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(args.epochs):
        epoch_started = time.perf_counter()
        model.train()
        for images, labels in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(images)
            criterion(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        epoch_seconds = time.perf_counter() - epoch_started
        print(f"epoch {epoch + 1}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    correct = score(model, DataLoader(val, 256, num_workers=args.num_workers), args.bf16)
    seconds = time.perf_counter() - started
    found = {"val_top1": 100 * correct / len(val), "seconds": round(seconds, 1)}
    print(json.dumps(found | {"last_epoch_seconds": round(epoch_seconds, 2)}))
    return 0


def read(root: Path, train_transform, val_transform):
    """Return torchvision's training and validation data: class folders, or the archives of CIFAR."""
    from torchvision import datasets

    for folder, archive in (
        ("cifar-10-batches-py", datasets.CIFAR10),
        ("cifar-100-python", datasets.CIFAR100),
    ):
        if (root / folder).is_dir():
            return archive(root, True, train_transform), archive(root, False, val_transform)
    held = root / "val" if (root / "val").is_dir() else root / "test"
    return datasets.ImageFolder(root / "train", train_transform), datasets.ImageFolder(held, val_transform)


def score(model, batches, bf16: bool) -> int:
    """Return how many images of `batches` the model gets right."""
    import torch

    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)


if __name__ == "__main__":
    sys.exit(errors.run(main))
