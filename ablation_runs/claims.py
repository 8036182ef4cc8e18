"""What the five documents claim, and what the studies say about it."""

from __future__ import annotations

from dataclasses import dataclass

from ablation_runs import results
from ablation_runs.results import Result
from ablation_runs.statistics import BETTER, WORSE, Difference
from ablation_runs.study import Study

NO_LOSS = "no loss"
MARGIN = 1.0  # points: "no loss" is confirmed if the interval excludes a larger one
GAP, EMA_GAIN = "gap", "ema - raw"
CONFIRMED, CONTRADICTED, UNDECIDED = "confirmed", "contradicted", "undecided"
DIRECTION = "direction confirmed, size contradicted"
OPPOSITE = {BETTER: WORSE, WORSE: BETTER}


@dataclass(frozen=True)
class Claim:
    """The comparison of `variant` with its study's first one that decides a claim.

    expected: BETTER, WORSE or NO_LOSS; of a gap, WORSE means smaller
    column: "" for the study's metric, GAP or EMA_GAIN
    points: the size of the difference, if the document names one
    """

    document: str
    text: str
    study: str
    variant: str
    expected: str = BETTER
    column: str = ""
    points: float | None = None


CLAIMS = (
    Claim("000", "A conv head in place of the linear layer is the most accurate",
          "tiny_imagenet_01", "conv-head"),
    Claim("000", "Progressive resizing raises the accuracy (over its first size; at 2.6 times the compute)",
          "tiny_imagenet_02", "progressive"),
    Claim("000", "CutMix along with MixUp raises the accuracy", "tiny_imagenet_02", "mixup+cutmix"),
    Claim("000", "Stochastic depth makes the gap small", "tiny_imagenet_02", "drop-path", WORSE, GAP),
    Claim("000", "The techniques together raise the accuracy (by about 10 points; here: over MixUp alone)",
          "tiny_imagenet_02", "all", points=10),
    Claim("000", "Without stochastic depth the gap is larger",
          "tiny_imagenet_03", "no-drop-path", BETTER, GAP),
    Claim("000", "EMA weights score better in validation", "tiny_imagenet_03", "ema-ramp", BETTER, EMA_GAIN),
    Claim("000", "A badly set decay keeps the EMA at chance", "ema", "plain-0.9999", WORSE),
    Claim("001", "ResNet beats Swin ('closely', without a figure)",
          "imagenet100_architectures", "swin_t", WORSE),
    Claim("001", "ResNet beats EfficientNet", "imagenet100_architectures", "efficientnet_b0", WORSE),
    Claim("001", "Half the size costs EfficientNet 26.4 points",
          "efficientnet_size_augmentation", "half-size", WORSE, points=-26.4),
    Claim("001", "Augmentation costs it 2.3 points",
          "efficientnet_size_augmentation", "large+augmentation", WORSE, points=-2.3),
    Claim("001", "Augmentation closes its gap (by 3.5 points)",
          "efficientnet_size_augmentation", "large+augmentation", WORSE, GAP, points=-3.5),
    Claim("002", "Progressive resizing keeps the accuracy (here: at equal compute)",
          "resize_schedules", "progressive", NO_LOSS),
    Claim("002", "Stochastic depth (0.2) improves generalization", "drop_path_rate", "0.2"),
    Claim("002", "Stochastic depth (0.2) makes the gap smaller", "drop_path_rate", "0.2", WORSE, GAP),
    Claim("002", "MixUp, 'a robust augmentation', raises the accuracy", "augmentation", "with-mixup"),
    Claim("002", "CutMix, 'a robust augmentation', raises the accuracy", "augmentation", "with-cutmix"),
    Claim("002", "Mixed precision costs no accuracy (less than one point; here: bf16)",
          "tiny_imagenet_01", "mixed-precision", NO_LOSS),
    Claim("002", "BlurPool improves the model", "blurpool", "blurpool"),
    Claim("003", "The plateau rule on top of cyclic rates raises the accuracy",
          "tiny_imagenet_resnet18", "triangular2+plateau"),
    Claim("004", "Mixing and label smoothing help the Adam loop", "cifar100_resnet34", "loop+mixing"),
    Claim("004", "SGD with warm restarts is the robust choice", "cifar100_resnet34", "sgd+restarts"),
    Claim("004", "Step decay is behind OneCycle", "schedules", "step", WORSE),
)  # fmt: skip


def judge(claim: Claim, runs: list[Result], study: Study) -> tuple[str, Difference | None]:
    """Return CONFIRMED, DIRECTION, CONTRADICTED or UNDECIDED, and the difference that says so."""
    if claim.column == EMA_GAIN:
        difference = results.gains(runs, study, "ema_val_top1", "val_top1").get(claim.variant)
    else:
        difference = results.compare(runs, study, claim.column or study.metric).get(claim.variant)
    if difference is None:
        return UNDECIDED, None
    if claim.expected == NO_LOSS:
        kept = difference.interval and difference.interval[0] > -MARGIN and difference.p is not None
        kept = kept and difference.verdict != WORSE
        return (CONFIRMED if kept else CONTRADICTED if difference.verdict == WORSE else UNDECIDED), difference
    if difference.verdict == claim.expected:
        low, high = difference.interval
        size_holds = claim.points is None or low <= claim.points <= high
        return CONFIRMED if size_holds else DIRECTION, difference
    return (CONTRADICTED if difference.verdict == OPPOSITE[claim.expected] else UNDECIDED), difference
