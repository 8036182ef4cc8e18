"""Layers that the architectures share: drop-path and antialiased downsampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.errors import UsageError, optional

BLURPOOL_NOTICE = (
    "note: --use-blurpool runs code of antialiased-cnns (Adobe), licensed CC BY-NC-SA 4.0: "
    "non-commercial use only, and changes must be shared under the same terms"
)


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): shortcut + branch, the branch dropped at random.

    In training, the branch of each sample is dropped with probability `p`.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Return shortcut + kept / (1 - p) * branch, all (N, ...); `kept`, 0 or 1, is drawn for each sample.

        Draws come from torch's default generator of the device.
        """
        if self.p == 0.0 or not self.training:
            return branch + shortcut
        keep = 1.0 - self.p
        # In a CUDA graph too, a step draws what its seed says: before each replay, torch copies the default
        # generator's current seed and offset to where the kernels read them (CUDAGeneratorState's
        # replay_prologue). Only a seed computed in Python inside this function would be frozen.
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        # Kept branches are scaled up, so that the expected value is that in evaluation. In one fused
        # operation: scaling the branch first would read and write it once more.
        return torch.addcmul(shortcut, branch, kept, value=1.0 / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


def set_drop_path_rate(model: nn.Module, rate: float) -> None:
    """Set the drop probability of branch i = 0 ... n - 1 to rate * i / (n - 1), as timm does.

    (The paper's linear rule begins at rate / n, torchvision's EfficientNet ends at rate * (n - 1) / n.) Also
    sets torchvision's StochasticDepth, found by name, to avoid the import. Does nothing to a model
    without such branches. Raises UsageError unless 0 <= rate < 1.
    """
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"drop-path rate {rate} is not in [0, 1)", "give a rate such as 0.2, or 0 for none")
    droppable = ("DropPath", "StochasticDepth")
    branches = [module for module in model.modules() if type(module).__name__ in droppable]
    for index, branch in enumerate(branches):
        branch.p = rate * index / max(1, len(branches) - 1)


class Blur(nn.Module):
    """BlurPool with a 4x4 filter and stride 2 (https://arxiv.org/abs/1904.11486), from antialiased-cnns.

    (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)), as from a strided 3x3 convolution. Padded with
    zeros: the package's default, reflection, cannot pad the 1x1 and 2x2 maps of 32 px images.
    Raises UsageError if the package is missing.
    """

    def __init__(self, channels: int):
        super().__init__()
        package = optional("antialiased_cnns", "--use-blurpool")
        self.pool = package.BlurPool(channels, pad_type="zero", filt_size=4, stride=2)
        # Not in the state dict, so that models with and without blur can exchange weights.
        self.pool.register_buffer("filt", self.pool.filt, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.pool(maps)
