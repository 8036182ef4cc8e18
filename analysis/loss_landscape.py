"""The loss around a point in weight space, before and after training (https://arxiv.org/abs/1712.09913).

Two random directions span the plane. Each of their filters has the norm of the weights' own filter, or a
network with large weights would look flat. Biases and normalization layers do not move.
"""

from __future__ import annotations

import sys

from analysis import arguments
from base import flags
from base.errors import run

EPILOG = """examples:
  python -m analysis.loss_landscape checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.loss_landscape CHECKPOINT --points 9 --samples 64          a quick look
  python -m analysis.loss_landscape CHECKPOINT --batch-norm batch
Writes loss_landscape.png and loss_landscape.json. Evaluates the samples 2 x points^2 times."""
TREATMENTS = {
    "running": "BatchNorm: running statistics of the centre",
    "batch": "BatchNorm: statistics of each batch",
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
    config, typed = arguments.parse(build_parser(), argv)
    import numpy as np

    from analysis.predictions import load_with_data, spread_ids
    from base import files

    classifier = load_with_data(config, typed)
    ids = spread_ids(len(classifier.index.val), config.samples)
    images, labels = classifier.batch(classifier.val_pixels(ids)), classifier.index.val.labels[ids]
    steps = np.linspace(-config.reach, config.reach, config.points | 1)  # odd: the centre is a point
    before = "random weights" if classifier.payload["config"]["init_from"] else "before training"
    initial = initial_model(classifier.payload).to(classifier.device)
    losses = {}
    for name, model in {before: initial, "after training": classifier.model}.items():
        losses[name] = landscape(model, images, labels, steps, config.batch_norm, config.seed, name)
    title = f"Loss on {len(ids)} validation images around {classifier.title}\n{TREATMENTS[config.batch_norm]}"
    arguments.save(config, {"loss_landscape.png": picture(losses, steps, title)})
    content = {
        "steps": steps.tolist(),
        "batch_norm": config.batch_norm,
        "samples": len(ids),
        "seed": config.seed,
        "losses": {name: grid.tolist() for name, grid in losses.items()},
    }
    files.write_json(arguments.out_dir(config) / "loss_landscape.json", content)
    return 0


def initial_model(payload: dict):
    """Return the network, in eval mode, with the random weights that the run's seed gives."""
    from base.device import seed_everything
    from models import build_model

    seed_everything(payload["config"]["seed"])  # as build.build_state does
    return build_model(**payload["model_args"]).eval()


def landscape(model, images, labels, steps, batch_norm: str, seed: int, name: str):
    """Return losses (n, n) at centre + steps[i] * first + steps[j] * second direction.

    images: (N, 3, H, W), labels: (N,) array, batch_norm: a key of TREATMENTS, name: for the progress bar.
    The model is left as it was.
    """
    import copy

    import numpy as np
    import torch
    from torch import nn

    from base.progress import Progress

    moved = copy.deepcopy(model).eval()
    for module in moved.modules():
        if batch_norm == "batch" and isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
    # One generator for both: different seeds can give the same numbers, and then the plane is a line.
    generator = torch.Generator().manual_seed(seed)
    first, second = direction(model, generator), direction(model, generator)
    centre, live = list(model.parameters()), list(moved.parameters())
    labels = torch.as_tensor(labels, device=images.device)
    losses = np.empty((len(steps), len(steps)))
    with torch.no_grad(), Progress(losses.size, name, unit="points") as bar:
        for i, j in bar.over(np.ndindex(losses.shape)):
            for p, start, a, b in zip(live, centre, first, second, strict=True):
                p.copy_(start + float(steps[i]) * a + float(steps[j]) * b)
            losses[i, j] = mean_loss(moved, images, labels)
    return losses


def direction(model, generator) -> list:
    """Return a random direction for every parameter, filter-normalized; zero for biases and norms."""
    import torch

    found = []
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            found.append(torch.zeros_like(p))
            continue
        # A filter is everything that makes one output; 1e-10 as in the paper's code.
        own, random = (t.detach().flatten(1).norm(dim=1) for t in (p, drawn))
        found.append(drawn * (own / (random + 1e-10)).view(-1, *[1] * (p.ndim - 1)))
    return found


def mean_loss(model, images, labels, batch_size: int = 256) -> float:
    """Return the plain cross-entropy (nats) over all images."""
    from torch.nn import functional as F

    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(F.cross_entropy(model(x).float(), y, reduction="sum").item() for x, y in batches) / len(images)


def picture(losses: dict, steps, title: str):
    """Draw a row for each point in training: contours and surface of losses[name], (n, n)."""
    import numpy as np

    from analysis import figures

    def power_of_ten(exponent: float, _position: int) -> str:
        return f"{10**exponent:.3g}"

    fig = figures.figure(10.5, 4.6 * len(losses) + 0.6, title)
    fig.get_layout_engine().set(h_pad=0.25, w_pad=0.2)
    middle, along = len(steps) // 2, "step along direction {} (filter norms)"
    for row, (name, grid) in enumerate(losses.items()):
        # Far from the centre the loss can reach thousands or overflow: colours and heights are logarithms.
        heights = np.log10(np.nan_to_num(grid, nan=1e6, posinf=1e6).clip(1e-3, 1e6))
        flat = fig.add_subplot(len(losses), 2, 2 * row + 1, xlabel=along.format(2), ylabel=along.format(1))
        flat.set(title=f"{name}: loss {grid[middle, middle]:.3f} at the centre", aspect="equal")
        filled = flat.contourf(steps, steps, heights, levels=24, cmap=figures.MAP)
        flat.contour(steps, steps, heights, levels=12, colors="white", linewidths=0.5)
        flat.plot([0], [0], "*", color=figures.VERMILLION, markersize=11)
        fig.colorbar(filled, ax=flat, label="cross-entropy (nats, log scale)", format=power_of_ten)
        solid = fig.add_subplot(len(losses), 2, 2 * row + 2, projection="3d")
        solid.plot_surface(*np.meshgrid(steps, steps), heights, cmap=figures.MAP, rstride=1, cstride=1)
        solid.set(xlabel="direction 2", ylabel="direction 1", zlabel="loss (nats, log scale)")
        solid.zaxis.set_major_formatter(power_of_ten)
        solid.tick_params(labelsize=8)
        for ax in (flat, solid):
            ax.locator_params(nbins=5)
    return fig


if __name__ == "__main__":
    sys.exit(run(main))
