"""Layers that the architectures share: drop-path and antialiased downsampling.

Importing this file costs no more than torch; antialiased-cnns is imported when a Blur is built.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from base.errors import UsageError

BLURPOOL_NOTICE = (
    "note: --use-blurpool runs code of antialiased-cnns (Adobe), licensed CC BY-NC-SA 4.0: "
    "non-commercial use only, and changes must be shared under the same terms"
)


class DropPath(nn.Module):
    """Add a residual branch to its shortcut; in training, drop it for some samples.

    Stochastic depth (https://arxiv.org/abs/1603.09382); `p` is the probability of dropping.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, ...), (N, ...) -> shortcut + kept / (1 - p) * branch, with `kept` drawn once per sample.

        Draws come from torch's default generator on the branch's device.
        """
        if self.p == 0.0 or not self.training:
            return branch + shortcut
        keep = 1.0 - self.p
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        # Kept branches are scaled up so that the expected value is that of evaluation. One fused
        # operation: scaling the branch first would read and write every block's output once more.
        return torch.addcmul(shortcut, branch, kept, value=1.0 / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


def set_drop_path_rate(model: nn.Module, rate: float) -> None:
    """Set the drop probability of branch i = 0 ... n - 1 to rate * i / (n - 1), the paper's linear rule.

    Covers torchvision's StochasticDepth too, recognised by its name to avoid the import; a model
    without droppable branches is left alone. Raises UsageError unless 0 <= rate < 1.
    """
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"drop-path rate {rate} is not in [0, 1)", "give a rate such as 0.2, or 0 for none")
    droppable = ("DropPath", "StochasticDepth")
    branches = [module for module in model.modules() if type(module).__name__ in droppable]
    for index, branch in enumerate(branches):
        branch.p = rate * index / max(1, len(branches) - 1)


class Blur(nn.Module):
    """Low-pass filter a map and halve it: BlurPool with a 4x4 filter (https://arxiv.org/abs/1904.11486).

    (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)), as a strided 3x3 convolution. Padded with zeros:
    the package's default, reflection, cannot pad the 1x1 and 2x2 maps of 32 px images.
    """

    def __init__(self, channels: int):
        super().__init__()
        try:
            package = importlib.import_module("antialiased_cnns")
        except ImportError as error:
            missing = "--use-blurpool needs the antialiased-cnns package"
            raise UsageError(missing, "pip install antialiased-cnns") from error
        self.pool = package.BlurPool(channels, pad_type="zero", filt_size=4, stride=2)
        # A constant: kept out of the state dict, so that models with and without blur exchange weights.
        self.pool.register_buffer("filt", self.pool.filt, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.pool(maps)


def has_blur(model: nn.Module) -> bool:
    return any(isinstance(module, Blur) for module in model.modules())
