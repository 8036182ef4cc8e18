"""What happens to a batch between the loader and the backward pass: soft targets, mixing, losses.

Shapes are images (N, C, H, W), labels (N,), targets (N, K), logits (N, K). Everything but
`BatchMixer`, which makes the random draws, is a pure function that returns new tensors.
Augmentation of single images lives in `sources.images`, in the loader's workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels (N,) int64 -> class probabilities (N, K) float32 on the same device.

    `smoothing` is the share spread evenly over all K classes, the right one included: the
    label smoothing of https://arxiv.org/abs/1512.00567 and of `F.cross_entropy`.
    """
    elsewhere = smoothing / num_classes
    # scatter_, because F.one_hot looks at the labels' values and thereby waits for a GPU.
    targets = torch.full((len(labels), num_classes), elsewhere, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + elsewhere)


def mixup(images: Tensor, targets: Tensor, partner: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Blend every sample with its partner (https://arxiv.org/abs/1710.09412).

    images:  (N, C, H, W) floating point
    targets: (N, K) class probabilities
    partner: (N,) index of the sample to blend in
    lam:     weight a sample keeps for itself, in [0, 1]
    """
    return torch.lerp(images[partner], images, lam), torch.lerp(targets[partner], targets, lam)


def cutmix(
    images: Tensor, targets: Tensor, partner: Tensor, box: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Paste `box` of each sample's partner into it (https://arxiv.org/abs/1905.04899).

    box: (top, left, bottom, right) in pixels, half-open and inside the image, as from
    `cutmix_box`; the other shapes are those of `mixup`. Images may also be uint8.
    """
    top, left, bottom, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    # Labels follow the area that was really pasted. The ratio that was drawn is not it: a box
    # near the border is clipped, and its sides are whole pixels.
    height, width = images.shape[-2:]
    kept = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets[partner], targets, kept)


def cutmix_box(lam: float, height: int, width: int, row: int, column: int) -> tuple[int, int, int, int]:
    """The box of area about 1 - lam centred on (row, column), clipped to the image.

    Returns (top, left, bottom, right), half-open. It is empty for lam = 1, and covers the
    whole image only for lam = 0 and a central (row, column).
    """
    half = 0.5 * math.sqrt(1.0 - lam)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    return top, left, bottom, right


class BatchMixer:
    """Turn a batch and its labels into mixed images and soft targets.

    Each batch gets MixUp or CutMix, with equal chance when both alphas are positive; an alpha
    of 0 switches that one off, and with both at 0 the images pass through as they are. One
    Beta(alpha, alpha) ratio per batch, as in both papers. Targets are smoothed here, once,
    before mixing: the loss must not smooth again.

    All draws are a few numbers from torch's default CPU generator, which the training loop
    seeds at every step. So a step can be replayed, and a GPU is never waited for.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, label_smoothing: float):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        kinds = ((self._mixup, mixup_alpha), (self._cutmix, cutmix_alpha))
        self._kinds = [(mix, _ratios(alpha)) for mix, alpha in kinds if alpha > 0]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, C, H, W) floating point, labels (N,) -> images (N, C, H, W), targets (N, K) float32."""
        targets = soft_targets(labels, self.num_classes, self.label_smoothing)
        if not self._kinds:
            return images, targets
        mix, ratios = self._kinds[_draw_below(len(self._kinds))]
        return mix(images, targets, draw_partner(len(images), images.device), ratios.sample().item())

    @staticmethod
    def _mixup(images: Tensor, targets: Tensor, partner: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        return mixup(images, targets, partner, lam)

    @staticmethod
    def _cutmix(images: Tensor, targets: Tensor, partner: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        box = cutmix_box(lam, height, width, _draw_below(height), _draw_below(width))
        return cutmix(images, targets, partner, box)


def draw_partner(num_samples: int, device: torch.device) -> Tensor:
    """(N,) a partner for each sample: all samples rotated by one random distance.

    Batches are shuffled already, so a rotation pairs as freely as a permutation does; it never
    pairs a sample with itself (unless it is alone), and is built on the device without a copy.
    """
    shift = 1 + _draw_below(num_samples - 1) if num_samples > 1 else 0
    return (torch.arange(num_samples, device=device) + shift) % num_samples


def _ratios(alpha: float) -> torch.distributions.Beta:
    # float64: at alpha 0.01 most float32 draws round to exactly 0 or 1.
    alpha_tensor = torch.tensor(alpha, dtype=torch.float64)
    return torch.distributions.Beta(alpha_tensor, alpha_tensor)


def _draw_below(bound: int) -> int:
    return int(torch.randint(bound, ()))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with soft targets: logits (N, K), targets (N, K) -> scalar, mean over samples."""
    return F.cross_entropy(*_promoted(logits, targets))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """One yes/no question per class (https://arxiv.org/abs/2110.00476): (N, K), (N, K) -> scalar.

    Summed over classes, then averaged over samples. A gradient is then (sigmoid - target) / N
    per logit, the size that cross entropy's is, so a learning rate or --clip-norm that suits one is
    of the right order for the other. timm averages over classes too: K times smaller, which LAMB
    does not notice. The targets are used as they are, without that paper's threshold.
    """
    summed = F.binary_cross_entropy_with_logits(*_promoted(logits, targets), reduction="sum")
    return summed / len(logits)


def _promoted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Half-precision logits meet float32 targets: the loss is computed in the wider of the two.
    dtype = torch.promote_types(logits.dtype, targets.dtype)
    return logits.to(dtype), targets.to(dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}


def l1_penalty(params: Iterable[Tensor]) -> Tensor:
    """Sum of |w| over the weights, i.e. parameters of two or more dimensions -> differentiable scalar.

    Biases and BatchNorm scales are left out, as they are from weight decay. Add it to the loss
    times --l1; call it outside autocast-sensitive code, it keeps the parameters' precision.
    """
    return torch.stack([p.abs().sum() for p in params if p.ndim > 1]).sum()


TOP = (1, 5)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are right at top-1 and top-5: logits (N, K), labels (N,) -> (N, 2) bool.

    A sample's rank is the number of classes that beat its label; equal logits are settled by the
    lower class index, as argmax does. A label whose logit is NaN is never right, and a NaN beats
    nobody.
    """
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return torch.stack([(rank < k) & ~own[:, 0].isnan() for k in TOP], 1)
