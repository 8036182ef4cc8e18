"""The arithmetic of a batch, from the loader to the loss: soft targets, mixing, losses, hits.

Shapes: images (N, C, H, W), labels (N,), targets (N, K), logits (N, K). All functions are pure and
return new tensors; `BatchMixer` alone draws random numbers. Augmentation of single images happens
in the loader's workers: see `sources.images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Turn labels (N,) int64 into class probabilities (N, K) float32 on the same device.

    `smoothing` is the share spread evenly over all K classes, the right one included: the
    label smoothing of https://arxiv.org/abs/1512.00567 and of `F.cross_entropy`.
    """
    elsewhere = smoothing / num_classes
    # scatter_, because F.one_hot reads the labels' values and so waits for a GPU.
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
    # Labels follow the area that was pasted, which is not quite the ratio that was drawn: a box
    # near the border is clipped, and its sides are whole pixels.
    height, width = images.shape[-2:]
    kept = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets[partner], targets, kept)


def cutmix_box(lam: float, height: int, width: int, row: int, column: int) -> tuple[int, int, int, int]:
    """Return the box of area about 1 - lam centred on (row, column), clipped to the image.

    (top, left, bottom, right), half-open. It is empty for lam = 1, and covers the whole image only
    for lam = 0 and a central (row, column).
    """
    half = 0.5 * math.sqrt(1.0 - lam)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    return top, left, bottom, right


class BatchMixer:
    """Turns a batch and its labels into mixed images and soft targets.

    Each batch gets MixUp or CutMix, with equal chance if both alphas are positive; an alpha of 0
    switches that one off, and with both at 0 the images pass unchanged. One Beta(alpha, alpha) ratio
    is drawn per batch, as in both papers. Targets are smoothed here, before mixing: the loss must
    not smooth them again.

    All draws are a few numbers from torch's default CPU generator, which the training loop seeds
    at every step. So a step can be replayed, and nothing waits for a GPU.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, label_smoothing: float):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        alphas = {"mixup": mixup_alpha, "cutmix": cutmix_alpha}
        self.kinds = [(kind, _beta(alpha)) for kind, alpha in alphas.items() if alpha > 0]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, C, H, W) float, labels (N,) -> images (N, C, H, W), targets (N, K) float32."""
        targets = soft_targets(labels, self.num_classes, self.label_smoothing)
        if not self.kinds:
            return images, targets
        kind, beta = self.kinds[_draw_below(len(self.kinds))]
        partner, lam = draw_partner(len(images), images.device), beta.sample().item()
        if kind == "mixup":
            return mixup(images, targets, partner, lam)
        height, width = images.shape[-2:]
        box = cutmix_box(lam, height, width, _draw_below(height), _draw_below(width))
        return cutmix(images, targets, partner, box)


def draw_partner(num_samples: int, device: torch.device) -> Tensor:
    """Draw a partner (N,) for each sample: all samples, rotated by one random distance.

    Batches are shuffled already, so a rotation pairs samples as freely as a permutation does. It never
    pairs a sample with itself (unless it is alone), and it is built on the device without a copy.
    """
    shift = 1 + _draw_below(num_samples - 1) if num_samples > 1 else 0
    return (torch.arange(num_samples, device=device) + shift) % num_samples


def _beta(alpha: float) -> torch.distributions.Beta:
    # float64: at alpha 0.01 most float32 draws round to exactly 0 or 1.
    concentration = torch.tensor(alpha, dtype=torch.float64)
    return torch.distributions.Beta(concentration, concentration)


def _draw_below(bound: int) -> int:
    return int(torch.randint(bound, ()))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of logits (N, K) against soft targets (N, K), a mean over samples."""
    return F.cross_entropy(*_promoted(logits, targets))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of K yes/no questions per sample (https://arxiv.org/abs/2110.00476), a scalar.

    Logits (N, K) and targets (N, K); summed over classes, averaged over samples. The gradient of a logit
    is (sigmoid - target) / N, of the size that cross entropy has, so a learning rate or --clip-norm for
    one is of the right order for the other. (timm averages over classes too: K times smaller, which
    LAMB does not notice.) The targets are used as they are, without that paper's threshold.
    """
    summed = F.binary_cross_entropy_with_logits(*_promoted(logits, targets), reduction="sum")
    return summed / len(logits)


def _promoted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Half-precision logits meet float32 targets: compute the loss in the wider of the two.
    dtype = torch.promote_types(logits.dtype, targets.dtype)
    return logits.to(dtype), targets.to(dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}


def l1_penalty(params: Iterable[Tensor]) -> Tensor:
    """Return the sum of |w| over all weights, a scalar to be added to the loss times --l1.

    Weights are the parameters of two or more dimensions: biases and BatchNorm scales are left out, as
    they are from weight decay. The result has the parameters' precision; call this outside autocast.
    """
    return torch.stack([p.abs().sum() for p in params if p.ndim > 1]).sum()


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are right at top-1 and at top-5: logits (N, K), labels (N,) -> (N, 2) bool.

    The rank of a label is the number of classes with a larger logit. Of equal logits the lower class
    comes first, as in argmax. A label whose logit is NaN is never right, and a NaN beats no class.
    """
    own = logits.gather(1, labels[:, None])  # (N, 1)
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & lower_class)).sum(1)
    return torch.stack([(rank < k) & ~own[:, 0].isnan() for k in (1, 5)], 1)
