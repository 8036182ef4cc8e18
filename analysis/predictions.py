"""A checkpoint's model put to work: opened with its weights, asked about batches, its answers kept.

validate.py and predict.py share this, so that what one scores is what the other predicts. Scores are
computed elsewhere, from the answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from base.device import Runtime
from base.errors import UsageError
from data_utils import hits
from harness import checkpoint


def open_models(path: str, weights: str, runtime: Runtime) -> tuple[dict[str, nn.Module], dict]:
    """The models of a checkpoint on the device, in eval mode, by their weights; and its payload.

    weights: 'raw', 'ema' (raw where the run kept no average) or 'both'
    """
    model, payload = checkpoint.load_model(path, "raw")
    averaged = payload["ema"].get("shadow")
    models = {"raw": model} if weights in ("raw", "both") or not averaged else {}
    if averaged and weights != "raw":
        models["ema"] = copy.deepcopy(model)
        models["ema"].load_state_dict(averaged)
    return {
        name: m.to(runtime.device, memory_format=torch.channels_last) for name, m in models.items()
    }, payload


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """images (N, 3, H, W) -> (N, K) float32, in the runtime's precision."""
    with runtime.autocast():
        return model(images).float()


def flipped_logits(model: nn.Module, images: Tensor, logits: Tensor, runtime: Runtime) -> Tensor:
    """Test-time augmentation: the log of the mean probability of each image and its mirror image (N, K)."""
    mirrored = logits_of(model, images.flip(3), runtime)
    return torch.stack([logits.log_softmax(1), mirrored.log_softmax(1)]).logsumexp(0) - np.log(2)


@dataclass(frozen=True)
class Answers:
    """What a model says about every sample, in order: arrays (n,), `right` (n, 2) for top-1 and top-5."""

    labels: np.ndarray
    guesses: np.ndarray  # of equal logits, the lowest class
    confidence: np.ndarray  # the probability of the guess
    losses: np.ndarray  # cross-entropy against the label
    right: np.ndarray


def ask(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    *,
    flip: bool = False,
    after_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, Answers]:
    """Every model's answers on every sample of `batches`, in one pass over the data.

    With `flip` also under "<name> flip", with the mirror image asked as well.
    """
    kept: dict[str, list] = {}
    for images, labels in batches:
        for name, model in models.items():
            logits = logits_of(model, images, runtime)
            kept.setdefault(name, []).append(_answers(logits, labels))
            if flip:
                both = flipped_logits(model, images, logits, runtime)
                kept.setdefault(f"{name} flip", []).append(_answers(both, labels))
        after_batch(len(labels))
    return {
        name: Answers(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
        for name, parts in kept.items()
    }


def _answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    classes = torch.arange(logits.shape[1], device=logits.device)
    settled = logits.nan_to_num(-torch.inf)
    # The lowest of equal logits, which argmax does not promise on every device.
    guesses = torch.where(settled == settled.amax(1, keepdim=True), classes, len(classes)).amin(1)
    confidence = logits.softmax(1).gather(1, guesses[:, None])[:, 0]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return tuple(part.cpu() for part in (labels, guesses, confidence, losses, hits(logits, labels)))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime) -> nn.Module:
    """A copy of `model` whose BatchNorm statistics are the mean over `batches`, nothing else changed.

    They were collected on augmented images at the training size; the test size may want others
    (https://arxiv.org/abs/1906.06423). Raises UsageError where there is no BatchNorm.
    """
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise UsageError("--recalibrate-bn: this architecture has no BatchNorm", "leave it out")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    for images, _ in batches:
        logits_of(model, images, runtime)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
