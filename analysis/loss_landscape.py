"""The loss around a point in weight space, before and after training (https://arxiv.org/abs/1712.09913).

Two random directions, each filter scaled to the norm of the weights' own filter, span the plane:
without that, a network whose weights are large would look flat. Biases and norms do not move.
"""

from __future__ import annotations

import sys

from analysis.arguments import add_checkpoint_args, out_dir, parse
from base import flags
from base.errors import run

EPILOG = """examples:
  python -m analysis.loss_landscape checkpoints/best_resnet50_imagenet_1k.pt --data-dir data/imagenet
  python -m analysis.loss_landscape CHECKPOINT --points 9 --samples 64          a quick look
  python -m analysis.loss_landscape CHECKPOINT --batch-norm batch
writes loss_landscape.png and loss_landscape.json; the time is 2 x points^2 evaluations of the samples"""
TREATMENTS = {
    "running": "BatchNorm: running statistics of the centre",
    "batch": "BatchNorm: statistics of each batch",
}


def build_parser() -> flags.Parser:
    parser = flags.build_parser(
        "-m analysis.loss_landscape", "Draw the loss around a model's weights.", EPILOG
    )
    add = parser.add_argument
    add(
        "--points",
        type=flags.number(int, 3, 201),
        default=15,
        metavar="N",
        help="per side of the grid; made odd",
    )
    add(
        "--reach",
        type=flags.above_zero,
        default=1.0,
        metavar="R",
        help="largest step, in norms of the filters",
    )
    add(
        "--samples",
        type=flags.positive,
        default=256,
        metavar="N",
        help="validation images, spread over the classes",
    )
    add(
        "--batch-norm",
        default="running",
        choices=tuple(TREATMENTS),
        help="statistics BatchNorm uses off the centre",
    )
    add("--seed", type=flags.natural, default=0, metavar="N", help="of the two directions")
    add_checkpoint_args(parser)
    flags.add_dataset_args(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config, typed = parse(build_parser(), argv)
    import numpy as np

    from analysis import figures
    from analysis.predictions import load_with_data, spread_ids
    from harness.rundir import write_json

    classifier = load_with_data(config, typed)
    ids = spread_ids(len(classifier.index.val), config.samples)
    images, labels = classifier.batch(classifier.val_pixels(ids)), classifier.index.val.labels[ids]
    steps = np.linspace(-config.reach, config.reach, config.points | 1)  # odd, so that the centre is a point
    before = "random weights" if classifier.payload["config"]["init_from"] else "before training"
    models = {
        before: initial_model(classifier.payload).to(classifier.device),
        "after training": classifier.model,
    }
    losses = {}
    for name, model in models.items():
        losses[name] = landscape(model, images, labels, steps, config.batch_norm, config.seed, name)
    title = f"Loss on {len(ids)} validation images around {classifier.title}\n{TREATMENTS[config.batch_norm]}"
    folder = out_dir(config)
    print(figures.save(picture(losses, steps, title), folder / "loss_landscape.png"))
    write_json(
        folder / "loss_landscape.json",
        {
            "steps": steps.tolist(),
            "batch_norm": config.batch_norm,
            "samples": len(ids),
            "seed": config.seed,
            "losses": {name: finite(grid) for name, grid in losses.items()},
        },
    )
    return 0


def initial_model(payload: dict):
    """The network with random weights from the run's seed, as a run without --init-from begins, in eval mode."""
    from base.device import seed_everything
    from models import build_model

    seed_everything(payload["config"]["seed"])  # as build.build_state does
    return build_model(**payload["model_args"]).eval()


def direction(model, generator) -> list:
    """A random direction for every parameter, filter-normalised; zero for biases and norms."""
    import torch

    found = []
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            found.append(torch.zeros_like(p))
            continue
        # A filter is everything that makes one output; the 1e-10 as in the paper's code.
        norms = [t.detach().flatten(1).norm(dim=1) for t in (p, drawn)]
        scale = (norms[0] / (norms[1] + 1e-10)).view(-1, *[1] * (p.ndim - 1))
        found.append(drawn * scale)
    return found


def landscape(model, images, labels, steps, batch_norm: str, seed: int, name: str):
    """Losses (n, n) at centre + steps[i] * first + steps[j] * second direction; the model is left as it was.

    images: (N, 3, H, W), labels: (N,) array; batch_norm: a key of TREATMENTS.
    """
    import copy

    import numpy as np
    import torch

    from base.progress import Progress

    moved = prepared(copy.deepcopy(model), batch_norm)
    # One generator for both: two seeds can be the same to it, and then the plane is a line.
    generator = torch.Generator().manual_seed(seed)
    first, second = direction(model, generator), direction(model, generator)
    centre, live = list(model.parameters()), list(moved.parameters())
    labels = torch.as_tensor(labels, device=images.device)
    losses = np.empty((len(steps), len(steps)))
    with torch.no_grad(), Progress(losses.size, name, unit="points") as bar:
        for (i, j), _ in np.ndenumerate(losses):
            for p, start, a, b in zip(live, centre, first, second, strict=True):
                p.copy_(start + float(steps[i]) * a + float(steps[j]) * b)
            losses[i, j] = mean_loss(moved, images, labels)
            bar.update()
    return losses


def prepared(model, batch_norm: str):
    """`model`, a copy to be thrown away, in eval mode; with 'batch', its BatchNorms normalise by the batch."""
    from torch import nn

    model.eval()
    for module in model.modules():
        if batch_norm == "batch" and isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
    return model


def mean_loss(model, images, labels, batch_size: int = 256) -> float:
    """Plain cross-entropy (nats) over all images."""
    from torch.nn import functional as F

    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(F.cross_entropy(model(x).float(), y, reduction="sum").item() for x, y in parts) / len(images)


def finite(grid) -> list:
    """The grid as nested lists; JSON has no infinity: null there."""
    return [[value if abs(value) < float("inf") else None for value in row] for row in grid.tolist()]


def picture(losses: dict, steps, title: str):
    """A row for each point in training: contours, and the surface above them."""
    import numpy as np

    from analysis import figures

    made = figures.figure(10.5, 4.6 * len(losses) + 0.6, title)
    made.get_layout_engine().set(h_pad=0.25, w_pad=0.2)
    for row, (name, grid) in enumerate(losses.items()):
        # Far from the centre the loss can reach thousands or overflow: colours and heights are logarithms.
        shown = np.log10(np.maximum(np.nan_to_num(grid, nan=1e6, posinf=1e6).clip(max=1e6), 1e-3))
        middle = len(steps) // 2
        centre = f"{name}: loss {grid[middle, middle]:.3f} at the centre"
        draw_contours(made, made.add_subplot(len(losses), 2, 2 * row + 1), steps, shown, centre)
        draw_surface(made.add_subplot(len(losses), 2, 2 * row + 2, projection="3d"), steps, shown)
    return made


def draw_contours(made, axis, steps, shown, title: str) -> None:
    from analysis import figures

    filled = axis.contourf(steps, steps, shown, levels=24, cmap=figures.MAP)
    axis.contour(steps, steps, shown, levels=12, colors="white", linewidths=0.5)
    axis.plot([0], [0], "*", color=figures.VERMILLION, markersize=11)
    axis.set(
        title=title,
        xlabel="step along direction 2 (filter norms)",
        ylabel="step along direction 1 (filter norms)",
    )
    axis.set_aspect("equal")
    axis.locator_params(nbins=5)
    bar = made.colorbar(filled, ax=axis, label="cross-entropy (nats, log scale)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:.3g}")


def draw_surface(axis, steps, shown) -> None:
    import numpy as np

    from analysis import figures

    axis.plot_surface(*np.meshgrid(steps, steps), shown, cmap=figures.MAP, rstride=1, cstride=1, linewidth=0)
    axis.zaxis.set_major_formatter(lambda value, _: f"{10**value:.3g}")
    axis.set(xlabel="direction 2", ylabel="direction 1", zlabel="loss (nats, log scale)")
    axis.locator_params(nbins=5)
    axis.tick_params(labelsize=8)


if __name__ == "__main__":
    sys.exit(run(main))
