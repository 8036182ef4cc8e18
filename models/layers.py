"""Small layers that the architectures share: drop-path and antialiased downsampling.

No architecture is here, and nothing of torchvision: importing this costs no more than torch.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from base.errors import UsageError

BLURPOOL_NOTICE = (
    "note: --use-blurpool runs code of antialiased-cnns (Adobe), licensed CC BY-NC-SA 4.0: "
    "non-commercial use only, changes under the same terms"
)


class DropPath(nn.Module):
    """Add a residual branch to its shortcut, leaving it out for some samples in training.

    Stochastic depth (https://arxiv.org/abs/1603.09382); `p` is the probability of leaving it out.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, ...), (N, ...) -> (N, ...): shortcut + kept / (1 - p) * branch, `kept` one coin per sample.

        The coins come from torch's default generator on the branch's device.
        """
        if self.p == 0.0 or not self.training:
            return branch + shortcut
        keep = 1.0 - self.p
        coins = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        # Kept branches are scaled up, so that training and evaluation expect the same value. One fused
        # operation: scaling the branch first would read and write every block's output once more.
        return torch.addcmul(shortcut, branch, coins, value=1.0 / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


def set_drop_path_rate(model: nn.Module, rate: float) -> None:
    """Give the model's i-th of n droppable branches the probability rate * i / (n - 1): the linear rule.

    Also reaches torchvision's StochasticDepth, told by its name to spare the import. A model that
    has no such branch stays as it is. Raises UsageError outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"drop-path rate {rate} is not in [0, 1)", "give a rate such as 0.2, or 0 for none")
    branches = [
        m for m in model.modules() if isinstance(m, DropPath) or type(m).__name__ == "StochasticDepth"
    ]
    for index, branch in enumerate(branches):
        branch.p = rate * index / max(1, len(branches) - 1)


class Blur(nn.Module):
    """Halve a map behind a 4x4 low-pass filter: BlurPool (https://arxiv.org/abs/1904.11486).

    (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)), the size a strided 3x3 convolution gives. The
    package's default padding, reflection, cannot pad the 1x1 and 2x2 maps of 32 px images: zeros can.
    """

    def __init__(self, channels: int):
        super().__init__()
        try:
            package = importlib.import_module("antialiased_cnns")
        except ImportError as error:
            raise UsageError(
                "--use-blurpool needs the antialiased-cnns package", "pip install antialiased-cnns"
            ) from error
        self.pool = package.BlurPool(channels, pad_type="zero", filt_size=4, stride=2)
        filt = self.pool.filt
        del self.pool.filt
        # A constant: kept out of the state dict, so that models with and without blur exchange weights.
        self.pool.register_buffer("filt", filt, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.pool(maps)


def has_blur(model: nn.Module) -> bool:
    return any(isinstance(module, Blur) for module in model.modules())
