"""Draw the loss around a model's weights, before and after training; see landscape_figures.py."""

from __future__ import annotations

import sys
from pathlib import Path

from analysis import arguments
from base import files, flags
from base.errors import run

EPILOG = """examples:
  python -m analysis.loss_landscape checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.loss_landscape CHECKPOINT --points 9 --samples 64          a quick look
  python -m analysis.loss_landscape CHECKPOINT --batch-norm batch
Writes loss_landscape.png and loss_landscape.json. Evaluates the samples 2 x points^2 times."""
TREATMENTS = {
    "running": "BatchNorm after training: running statistics of the centre",
    "batch": "BatchNorm after training: statistics of each batch",
}


def build_parser() -> flags.Parser:
    description = "Draw the loss around a model's weights."
    parser = arguments.checkpoint_parser("loss_landscape", description, EPILOG)
    add, odd = parser.add_argument, flags.number(int, 3, 201)
    add("--points", type=odd, default=15, metavar="N", help="Points along each side; rounded up to odd.")
    add("--reach", type=flags.above_zero, default=1.0, metavar="R", help="Largest step, in filter norms.")
    add("--samples", type=flags.positive, default=256, metavar="N", help="Number of validation images.")
    statistics = "Statistics that BatchNorm uses."
    add("--batch-norm", default="running", choices=tuple(TREATMENTS), help=statistics)
    add("--seed", type=flags.natural, default=0, metavar="N", help="Random seed of the two directions.")
    return parser


def main(argv: list[str] | None = None) -> int:
    config, given = arguments.parse(build_parser(), argv)
    from analysis import landscape_figures
    from analysis.predictions import load_with_data

    classifier = load_with_data(config, given)
    ids = classifier.spread_ids(config.samples)
    images, labels = classifier.batch(classifier.val_pixels(ids)), classifier.index.val.labels[ids]
    steps = landscape_figures.steps_along(config.reach, config.points)
    how = classifier.payload["config"]
    before = "random weights" if how["init_from"] or how.get("pretrained") else "before training"
    initial = landscape_figures.initial_model(classifier.payload).to(classifier.device)
    # Untrained running statistics (mean 0, variance 1) match no real input: the surface would be flat.
    before += ", statistics of each batch" if config.batch_norm == "running" else ""
    losses = {}
    for name, model, by_batch in (
        (before, initial, True),
        ("after training", classifier.model, config.batch_norm == "batch"),
    ):
        options = {"batch_statistics": by_batch, "seed": config.seed, "title": name}
        losses[name] = landscape_figures.landscape(model, images, labels, steps, **options)
    title = f"Loss on {len(ids)} validation images around {classifier.title}\n{TREATMENTS[config.batch_norm]}"
    arguments.save(config, {"loss_landscape.png": landscape_figures.draw(losses, steps, title)})
    content = {
        "steps": steps.tolist(),
        "batch_norm": config.batch_norm,
        "samples": len(ids),
        "seed": config.seed,
        "losses": {name: grid.tolist() for name, grid in losses.items()},
    }
    files.write_json(Path(config.out, "loss_landscape.json"), content)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
