"""The loss around a point in weight space (https://arxiv.org/abs/1712.09913), and its picture.

Two random directions span a plane. Each of their filters has the norm of the weights' own filter, or a
network with large weights would look flat. Biases and normalization layers do not move.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from analysis import figures
from base.device import seed_everything
from base.progress import Progress
from models import build_model


def initial_model(payload: dict) -> nn.Module:
    """Return the network, in eval mode, with the random weights that the run's seed gives."""
    seed_everything(payload["config"]["seed"])  # as build.build_state does
    return build_model(**payload["model_args"]).eval()


def steps_along(reach: float, points: int) -> np.ndarray:
    """Return steps from -reach to reach: an odd number of them, so that one is the centre."""
    return np.linspace(-reach, reach, points | 1)


def landscape(
    model: nn.Module,
    images: Tensor,
    labels: np.ndarray,
    steps: np.ndarray,
    *,
    batch_statistics: bool,
    seed: int,
    title: str,
) -> np.ndarray:
    """Return losses (n, n) at centre + steps[i] * first + steps[j] * second direction.

    images: (N, 3, H, W), labels: (N,), batch_statistics: BatchNorm uses those of each batch, title: of the
    progress bar. The model is left as it was.
    """
    moved = copy.deepcopy(model).eval()
    for module in moved.modules():
        if batch_statistics and isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
    # One generator for both: different seeds can give the same numbers, and then the plane is a line.
    generator = torch.Generator().manual_seed(seed)
    first, second = direction(model, generator), direction(model, generator)
    centre, live = list(model.parameters()), list(moved.parameters())
    labels = torch.as_tensor(labels, device=images.device)
    losses = np.empty((len(steps), len(steps)))
    with torch.no_grad(), Progress(losses.size, title, unit="points") as bar:
        for i, j in bar.over(np.ndindex(losses.shape)):
            for p, start, a, b in zip(live, centre, first, second, strict=True):
                p.copy_(start + float(steps[i]) * a + float(steps[j]) * b)
            losses[i, j] = mean_loss(moved, images, labels)
    return losses


def direction(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """Return a random direction for every parameter, filter-normalized; zero for biases and norms."""
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


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Return the plain cross-entropy (nats) over all images."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(F.cross_entropy(model(x).float(), y, reduction="sum").item() for x, y in batches) / len(images)


def draw(losses: dict[str, np.ndarray], steps: np.ndarray, title: str) -> Figure:
    """Draw a row for each point in training: contours and surface of losses[name], (n, n), on one scale."""
    fig = figures.figure(10.5, 4.6 * len(losses) + 0.6, title)
    fig.get_layout_engine().set(h_pad=0.25, w_pad=0.2)
    middle, along = len(steps) // 2, "step along direction {} (filter norms)"
    # Far from the centre the loss can reach thousands or overflow: colours and heights are logarithms.
    logs = {n: np.log10(np.nan_to_num(g, nan=1e6, posinf=1e6).clip(1e-3, 1e6)) for n, g in losses.items()}
    low, high = min(map(np.min, logs.values())), max(map(np.max, logs.values())) + 1e-6
    levels, white = np.linspace(low, high, 25), {"colors": "white", "linewidths": 0.5, "linestyles": "solid"}
    for row, (name, heights) in enumerate(logs.items()):
        flat = fig.add_subplot(len(losses), 2, 2 * row + 1, xlabel=along.format(2), ylabel=along.format(1))
        flat.set(title=f"{name}: loss {losses[name][middle, middle]:.3f} at the centre", aspect="equal")
        filled = flat.contourf(steps, steps, heights, levels=levels, cmap=figures.MAP)
        flat.contour(steps, steps, heights, levels=levels, **white)
        flat.plot([0], [0], "*", color=figures.VERMILLION, markersize=11)
        fig.colorbar(filled, ax=flat, label="cross-entropy (nats, log scale)", format=power_of_ten)
        solid = fig.add_subplot(len(losses), 2, 2 * row + 2, projection="3d")
        solid.plot_surface(
            *np.meshgrid(steps, steps), heights, cmap=figures.MAP, vmin=low, vmax=high, rstride=1, cstride=1
        )
        solid.set(
            zlim=(low, high), xlabel="direction 2", ylabel="direction 1", zlabel="loss (nats, log scale)"
        )
        solid.zaxis.set_major_formatter(power_of_ten)
        solid.tick_params(labelsize=8)
        for ax in (flat, solid):
            ax.locator_params(nbins=5)
    return fig


def power_of_ten(exponent: float, _position: int) -> str:
    return f"{10**exponent:.3g}"
