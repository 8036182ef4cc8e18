"""What is computed on whole batches: soft targets, MixUp and CutMix, losses, top-1 and top-5 hits.

Shapes: images (N, C, H, W), labels (N,), targets (N, K), logits (N, K). No function changes its
arguments. Single images are augmented in the loader's workers: see `sources.augment`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Turn labels (N,) int64 into class probabilities (N, K) float32 on the same device.

    `smoothing` is the probability spread evenly over all K classes, the right one included: the label
    smoothing of https://arxiv.org/abs/1512.00567 and of `F.cross_entropy`.
    """
    spread = smoothing / num_classes
    # Not F.one_hot, which reads the labels and so waits for a GPU.
    targets = torch.full((len(labels), num_classes), spread, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + spread)


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
    # Weight the labels by the area that was pasted. It differs from the ratio that was drawn, because
    # boxes are clipped at the border and their sides are whole pixels.
    height, width = images.shape[-2:]
    kept = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets[partner], targets, kept)


def cutmix_box(lam: float, height: int, width: int, row: int, column: int) -> tuple[int, int, int, int]:
    """Return the box of area about 1 - lam centred on (row, column), clipped to the image.

    The box is (top, left, bottom, right) in pixels, half-open. At lam = 1 it is empty.
    """
    half = 0.5 * math.sqrt(1.0 - lam)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    return top, left, bottom, right


class BatchMixer:
    """Turns a batch and its labels into mixed images and soft targets.

    Each batch gets MixUp or CutMix, with equal probability if both alphas are positive. An alpha of 0
    disables its method; if both are 0, images are returned unchanged. One Beta(alpha, alpha) ratio is
    drawn per batch. Labels are smoothed here, before mixing, so the loss must not smooth them again.

    Draws come from torch's default CPU generator, which `train_step` seeds at every step: a step can be
    repeated exactly, and nothing waits for a GPU.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, label_smoothing: float):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        alphas = {"mixup": mixup_alpha, "cutmix": cutmix_alpha}
        self.kinds = [(kind, _beta(alpha)) for kind, alpha in alphas.items() if alpha > 0]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W) float and labels (N,) int64; return images and targets (N, K) float32."""
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
    """Draw the index of a partner for each sample, (N,) int64: sample i gets (i + random shift) mod N.

    In a shuffled batch this is as random as a permutation. It never pairs a sample with itself (if
    N > 1), and is computed on the device, without a copy from the CPU.
    """
    shift = 1 + _draw_below(num_samples - 1) if num_samples > 1 else 0
    return (torch.arange(num_samples, device=device) + shift) % num_samples


def _beta(alpha: float) -> torch.distributions.Beta:
    # In float32, most draws at alpha 0.01 round to exactly 0 or 1.
    concentration = torch.tensor(alpha, dtype=torch.float64)
    return torch.distributions.Beta(concentration, concentration)


def _draw_below(bound: int) -> int:
    return int(torch.randint(bound, ()))


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits (N, K) and soft targets (N, K), averaged over samples: a scalar.

    weights: (K,), which multiply the classes' terms: -sum_k weights_k * target_k * log p_k
    """
    return F.cross_entropy(*_promoted(logits, targets), weight=weights)


def balanced_weights(counts: Tensor) -> Tensor:
    """Return the class weights (K,) float32 that scikit-learn calls "balanced", for `counts` (K,) of images.

    They are N / (K * count), so their mean over the N images is 1.
    """
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


def binary_cross_entropy(logits: Tensor, targets: Tensor, threshold: float | None = None) -> Tensor:
    """Return the binary cross-entropy of logits (N, K) and targets (N, K): a scalar.

    threshold: targets above it become 1, and others 0, as in https://arxiv.org/abs/2110.00476

    Averaged over samples and classes, as in timm's runs of that paper. A sum over classes would train
    otherwise: with 1,000 classes most gradients of the mean are below LAMB's eps, those of the sum above.
    """
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(*_promoted(logits, targets))


def _promoted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # Half-precision logits meet float32 targets: compute the loss in the wider of the two.
    dtype = torch.promote_types(logits.dtype, targets.dtype)
    return logits.to(dtype), targets.to(dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}


def l1_penalty(weights: Iterable[Tensor]) -> Tensor:
    """Return the sum of |w| over all `weights`: a scalar, which --l1 multiplies.

    Call this outside autocast, to compute it in the weights' precision.
    """
    return torch.stack([w.abs().sum() for w in weights]).sum()


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are right at top-1 and at top-5: logits (N, K), labels (N,) -> (N, 2) bool.

    Among equal logits the lower class ranks first, as in argmax. A label whose own logit is NaN is never
    right; the NaN of another class ranks below every number.
    """
    own = logits.gather(1, labels[:, None])  # (N, 1)
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & lower_class)).sum(1)
    return torch.stack([(rank < k) & ~own[:, 0].isnan() for k in (1, 5)], 1)
