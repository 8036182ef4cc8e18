"""What training sees: batches after augmentation and mixing, with their soft labels.

Takes the flags of train.py and draws the very batches that this run would train on. Order, augmentation
and mixing are functions of the seed and the step, so nothing needs to be trained.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from base import flags
from base.errors import UsageError, run

EPILOG = """examples:
  python -m analysis.batch --data-dir data/imagenet --show-epoch 31          the first batches of phase 2
  python -m analysis.batch --dataset digits --augment affine --cutmix-alpha 0
  python -m analysis.batch --config recipes/digits.yaml --show-steps 5       with any flags of train.py"""


def build_parser() -> flags.Parser:
    parser = flags.build_parser("-m analysis.batch", "Show the batches that train.py would train on.", EPILOG)
    add = parser.add_argument_group("picture").add_argument
    add("--out", default="", metavar="DIR", help="Output directory. Default: --save-dir/plots.")
    add("--show-epoch", type=flags.positive, default=1, metavar="N", help="Epoch to show.")
    add("--show-steps", type=flags.positive, default=4, metavar="N", help="Batches, one in each row.")
    add("--show-images", type=flags.positive, default=8, metavar="N", help="Images of each batch.")
    for title, group in flags.TRAIN_GROUPS.items():
        flags.add_flags(parser, title, group)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = flags.parse(build_parser(), argv)
    flags.check_train(config, typed)
    if config.show_epoch > config.epochs:
        problem = f"--show-epoch {config.show_epoch} > --epochs {config.epochs}"
        raise UsageError(problem, "name an epoch of the run")
    from analysis import figures
    from sources import layouts

    index = layouts.open_dataset(**flags.data_args(config))
    fig = picture(config, index)
    folder = Path(config.out) if config.out else Path(config.save_dir) / "plots"
    print(figures.save(fig, folder / "batch.png"))
    return 0


def picture(config, index):
    """Draw one row for each step: the mixed images above the shares of their classes."""
    import torch

    from analysis import figures
    from base.device import Runtime
    from harness import build
    from loop import start_phase
    from train_utils import phase_of

    phases = build.make_plan(config, index, world_size=1)
    phase = phase_of(phases, config.show_epoch)
    training = build.build(config, index, Runtime(torch.device("cpu")), phases, Path(config.save_dir))
    loader, options = start_phase(training, phase)
    loader.order.seek(config.show_epoch)
    names = [figures.shorten(str(name).split(",")[0], 16) for name in index.class_names or index.classes]
    first_step = phase.step_before(config.show_epoch)
    rows = []
    for images, targets in mixed(loader, options, first_step, config.show_steps):
        shown = [as_pixels(image, index) for image in images[: config.show_images]]
        rows.append((shown, [label(target, names) for target in targets[: config.show_images]]))
    mixing = f"mixup {config.mixup_alpha:g}, cutmix {config.cutmix_alpha:g}" if phase.mix else "no mixing"
    title = (
        f"What training sees in epoch {config.show_epoch}: {phase.image_size} px, batch {phase.batch_size}\n"
        f"augment {figures.shorten(config.augment, 60)}, {mixing}, label smoothing {config.label_smoothing:g}"
    )
    steps = [f"step {first_step + k + 1}" for k in range(len(rows))]
    return figures.strips(rows, title=title, names=steps)


def mixed(loader, options, first_step: int, count: int):
    """Yield the first `count` batches as train_step sees them: images (N, 3, H, W), targets (N, K)."""
    from base.device import seed_everything

    for step, (images, labels) in enumerate(islice(loader, count), first_step):
        seed_everything(options.seed, step, 0)  # as train_step does before it mixes
        yield options.mixer(images, labels)


def as_pixels(image, index):
    """Return a normalized image (3, H, W) as (H, W, 3) uint8."""
    import torch

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (index.mean, index.std))
    return (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def label(target, names: list[str]) -> str:
    """Return the two largest shares of a soft label (K,), one per line, without what smoothing spreads."""
    shares, classes = target.topk(min(2, len(target)))
    rest = (1 - shares.sum().item()) / max(1, len(target) - 2)
    kept = [(s, k) for s, k in zip(shares.tolist(), classes.tolist(), strict=True) if s > rest + 0.005]
    return "\n".join(f"{s:.2f} {names[k]}" for s, k in kept or [(shares[0].item(), classes[0].item())])


if __name__ == "__main__":
    sys.exit(run(main))
