"""The studies as data; study.py explains the fields.

"000" to "004" are the documents the project starts from. Their own figures come from one run with one seed.
"""

from __future__ import annotations

from ablation_runs.study import Study, grid
from base.errors import UsageError, did_you_mean

UNREGULARIZED = {"mixup_alpha": 0, "cutmix_alpha": 0, "label_smoothing": 0, "drop_path_rate": 0, "ema": False}
TINY_IMAGENET = {"dataset": "tiny-imagenet", "arch": "resnet50", "epochs": 30, "batch_size": 256}
TINY_IMAGENET |= {"resize_schedule": [64], "lr": 1e-3}

# CPU presets: a few minutes a run on two cores. Where the question is not about another network, it is
# answered with a ResNet-18 of an eighth of the width, 0.2 million parameters. Choices are made on images held
# out of training; the official validation images are scored once, at the end.
SMALL = {"arch": "resnet18", "width": 8, "stem": "small", "batch_size": 128}
SMALL_TITLE = "ResNet-18 of width 8"
TINY_20 = SMALL | {"dataset": "tiny-imagenet", "classes": 20, "holdout": 1000, "epochs": 12}
TINY_20 |= {"resize_schedule": [32]}
TINY_20_TITLE = "the first 20 classes of Tiny ImageNet (9,000 + 1,000 held out + 1,000 images)"
CIFAR_20 = SMALL | {"dataset": "cifar100", "classes": 20, "holdout": 1000, "epochs": 16}
CIFAR_20_TITLE = "the first 20 classes of CIFAR-100 (9,000 + 1,000 held out + 2,000 images)"
CIFAR_10 = SMALL | {"dataset": "cifar10", "holdout": 5000, "subset": True, "subset_size": 15_000}
CIFAR_10 |= {"epochs": 10}
CIFAR_10_TITLE = "CIFAR-10 (15,000 + 5,000 held out + 10,000 images)"
TINY_10 = {"dataset": "tiny-imagenet", "classes": 10, "holdout": 500, "batch_size": 64}
TINY_10_TITLE = "the first 10 classes of Tiny ImageNet"

TINY_IMAGENET_01 = Study(
    name="tiny_imagenet_01",
    source="000",
    question="ResNet-50: plain, pre-activation or conv head? What do augmentation, MixUp and AMP add?",
    base=TINY_IMAGENET | {"head": "linear", "augment": "none", "amp": "off"} | UNREGULARIZED,
    variants={
        "plain": {},
        "pre-activation": {"arch": "preact_resnet50"},
        "conv-head": {"head": "conv"},
        "augmentation": {"augment": "full"},
        "mixup": {"mixup_alpha": 0.2},
        "mixed-precision": {"amp": "bf16"},
    },
    cpu=TINY_20 | {"arch": "resnet50", "stem": "imagenet", "resize_schedule": [48], "amp": "off"},
    cpu_variants={"pre-activation": {"arch": "preact_resnet50"}},
    cpu_title=f"{TINY_20_TITLE}, 48 px, ResNet-50 of width 8, 12 epochs",
    published="The basic architecture with a convolutional last layer was best. The LR finder needs tuning.",
    notes="Find the learning rate with `python lr_finder.py --dataset tiny-imagenet --resize-schedule 64`, "
    "then pass it on: `python -m ablation_runs.run tiny_imagenet_01 ... -- --lr SUGGESTION`. The default is "
    "0.001.\n"
    "After global pooling, a 1x1 convolution and a linear layer compute the same function, and here both "
    "start from the same weights: with one seed, `plain` and `conv-head` differ by rounding only.",
)

TINY_IMAGENET_02 = Study(
    name="tiny_imagenet_02",
    source="000",
    question="What do progressive resizing, CutMix in half of the batches, and stochastic depth each change?",
    base=TINY_IMAGENET
    | {"augment": "basic", "mixup_alpha": 0.2, "cutmix_alpha": 0, "drop_path_rate": 0, "ema": False},
    variants={
        "mixup": {},
        "progressive": {"resize_schedule": [64, 128, 224]},
        "last-size-only": {"resize_schedule": [224], "batch_size": 64},
        "last-size-equal-compute": {"resize_schedule": [224], "batch_size": 64, "epochs": 16},
        "mixup+cutmix": {"cutmix_alpha": 1},
        "drop-path": {"drop_path_rate": 0.2},
        "all": {"resize_schedule": [64, 128, 224], "cutmix_alpha": 1, "drop_path_rate": 0.2},
    },
    controls=("last-size-only", "last-size-equal-compute"),
    published="Progressive resizing and CutMix with MixUp raise accuracy by about 10 points; stochastic "
    "depth makes the gap between training and test accuracy very small.",
    notes="Progressive resizing changes three things at once: the training size, the validation size and "
    "the batch size. `last-size-only` is the control: it uses the last size and batch size from the start; "
    "`last-size-equal-compute` does so for fewer epochs, as much compute (epochs x px^2) as `progressive`.",
    cpu=TINY_20 | {"resize_schedule": [16]},
    cpu_variants={
        "progressive": {"resize_schedule": [16, 24, 32]},
        "last-size-only": {"resize_schedule": [32], "batch_size": 32},
        "last-size-equal-compute": {"resize_schedule": [32], "batch_size": 32, "epochs": 8},
        "all": {"resize_schedule": [16, 24, 32], "cutmix_alpha": 1, "drop_path_rate": 0.2},
    },
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, 12 epochs",
)

TINY_IMAGENET_03 = Study(
    name="tiny_imagenet_03",
    source="000",
    question="With all techniques together, which EMA works? Are clipping and stochastic depth needed?",
    base=TINY_IMAGENET
    | {"head": "conv", "resize_schedule": [64, 128, 224], "augment": "full", "mixup_alpha": 0.2}
    | {"cutmix_alpha": 1, "drop_path_rate": 0.2, "clip_norm": 1},
    variants={
        "ema-ramp": {},
        "ema-plain": {"ema_ramp": False},
        "ema-half-life": {"ema_half_life": 1},
        "no-clipping": {"clip_norm": 0},
        "no-drop-path": {"drop_path_rate": 0},
    },
    metric="ema_val_top1",
    published="About 67 % with all techniques; stochastic depth reduced the gap; EMA weights scored better.",
    published_scores={"ema-ramp": "about 67 %", "ema-plain": "0.5 % (first attempt)"},
    notes="On a CPU the augmentation is `basic`, and runs that begin at 16 px are in fp32.",
    cpu=TINY_20 | {"resize_schedule": [16, 24, 32], "augment": "basic"},
    cpu_variants={"ema-half-life": {"ema_half_life": 0.25}},
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, 12 epochs",
)

IMAGENET100_ARCHITECTURES = Study(
    name="imagenet100_architectures",
    source="001",
    question="How far do five architectures get on ImageNet-100 in 10 epochs (transformers: 5 or 6)?",
    base={"dataset": "imagenet100", "batch_size": 128, "resize_schedule": [224], "epochs": 10}
    | {"early_stop_patience": 3, "augment": "basic", "lr": 1e-3}
    | UNREGULARIZED,
    variants={
        "resnet50": {},
        "swin_t": {"arch": "swin_t", "epochs": 5, "lr": 5e-4},
        "efficientnet_b0": {"arch": "efficientnet_b0"},
        "vit_b_16": {"arch": "vit_b_16", "epochs": 6, "lr": 3e-4},
        "mobilenet_v3_large": {"arch": "mobilenet_v3_large"},
    },
    cpu=TINY_10 | {"subset": True, "subset_size": 2000, "resize_schedule": [32], "eval_every": 1},
    cpu_title=f"{TINY_10_TITLE} (2,000 + 500 held out + 500 images), 32 px",
    published="ResNet was best, closely followed by Swin, then EfficientNet. ViT needs longer training; "
    "MobileNet is efficient and comparable to larger models.",
    notes="The budgets differ, as in the document: this ranks what some GPU hours buy, not architectures. "
    "EfficientNet and MobileNet keep torchvision's dropout of 0.2 before the classifier.",
)

EFFICIENTNET_SIZE_AUGMENTATION = Study(
    name="efficientnet_size_augmentation",
    source="001",
    question="How do image size and augmentation affect EfficientNet-B0 on ImageNet-100?",
    base={"dataset": "imagenet100", "arch": "efficientnet_b0", "batch_size": 128, "epochs": 10, "lr": 1e-3}
    | UNREGULARIZED,
    variants={
        "large": {"resize_schedule": [128], "augment": "none"},
        "half-size": {"resize_schedule": [64], "augment": "none"},
        "large+augmentation": {"resize_schedule": [128], "augment": "full"},
    },
    published_scores={
        "large": "58 % (train 61 %) at 128 px",
        "half-size": "31.6 % (train 34.8 %) at 64 px",
        "large+augmentation": "55.7 % (train 55.2 %) at 128 px",
    },
    cpu=TINY_10 | {"epochs": 6, "amp": "off"},  # its depthwise convolutions are slow in bf16 on a CPU
    cpu_variants={
        "large": {"resize_schedule": [64], "augment": "none"},
        "half-size": {"resize_schedule": [32], "augment": "none"},
        "large+augmentation": {"resize_schedule": [64], "augment": "full"},
    },
    cpu_title=f"{TINY_10_TITLE} (4,500 + 500 held out + 500 images), 64 and 32 px, 6 epochs",
)

TINY_IMAGENET_RESNET18 = Study(
    name="tiny_imagenet_resnet18",
    source="003",
    question="ResNet-18 on a 70/30 split of Tiny ImageNet: cyclic schedule, plateau or both? Does L1 help?",
    base=TINY_IMAGENET
    | {"split": "70-30", "arch": "resnet18", "stem": "small", "head": "linear", "epochs": 50}
    | {"augment": "padcrop:8,flip,cutout:16", "optimizer": "sgd", "momentum": 0.9, "nesterov": True}
    | {"lr": 0.1, "weight_decay": 5e-4}
    | UNREGULARIZED,
    variants={
        "triangular2": {"schedule": "triangular2", "cycles": 3},
        "plateau": {"schedule": "plateau"},
        "triangular2+plateau": {"schedule": "triangular2", "cycles": 3, "plateau_patience": 2},
        "triangular2+l1": {"schedule": "triangular2", "cycles": 3, "l1": 1e-6},
        "onecycle": {"schedule": "onecycle"},
    },
    controls=("plateau", "triangular2+plateau"),
    cpu=TINY_20 | {"split": "70-30", "augment": "padcrop:4,flip,cutout:8", "eval_every": 1},
    cpu_variants={
        "plateau": {"schedule": "plateau", "plateau_patience": 0},
        "triangular2+plateau": {"schedule": "triangular2", "cycles": 3, "plateau_patience": 0},
    },
    cpu_title="the first 20 classes of Tiny ImageNet, split 70/30 (6,700 + 1,000 held out + 3,300 images), "
    f"32 px, {SMALL_TITLE}, 12 epochs",
    published="61.52 % (train 91.19 %) at epoch 50, with both schedules at once; 50 % at epoch 16.",
    notes="The validation images are drawn from the training and validation sets together: the "
    "scores cannot be compared with those on the official validation set.\nOn a CPU the plateau rule has "
    "patience 0. It was chosen after six seeds had shown that patience 2 and 4 never act within 12 epochs: "
    "so the variants with it get no verdict.",
    commands=(
        "python -m analysis.misclassified {best} --data-dir {data}",
        "python -m analysis.gradcam {best} --data-dir {data}",
    ),
)

# The recipe follows the document's code: Adam, OneCycleLR, no mixing. The document's text names SGD, warm
# restarts, mixing and label smoothing instead.
CIFAR = "cifar100_resnet34"
SGD = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}
MIXING = {"mixup_alpha": 0.2, "cutmix_alpha": 1, "label_smoothing": 0.1}
RESTARTS = {"schedule": "restarts", "cycles": 3}
ON_CIFAR_20 = {"recipe": CIFAR, "cpu": CIFAR_20, "cpu_title": f"{CIFAR_20_TITLE}, {SMALL_TITLE}, 16 epochs"}

CIFAR100_RESNET34 = Study(
    name="cifar100_resnet34",
    source="004",
    question="ResNet-34 on CIFAR-100: the document's code (Adam, OneCycle) or text (SGD, restarts, mixing)?",
    recipe=CIFAR,
    variants={
        "loop": {},
        "loop+mixing": MIXING,
        "sgd+restarts": SGD | RESTARTS,
        "overview": SGD | RESTARTS | MIXING,
    },
    cpu=CIFAR_20 | {"arch": "resnet34", "epochs": 12},
    cpu_title=f"{CIFAR_20_TITLE}, ResNet-34 of width 8, 12 epochs",
    published="A target of 70-75 % top-1; no result is given.",
    published_scores={"loop": "target 70-75 %", "overview": "target 70-75 %"},
)

LR_EXPLORATION = Study(
    name="lr_exploration",
    source="004",
    question="Which peak learning rate suits Adam with OneCycle on CIFAR-100?",
    variants={f"lr={lr}": {"lr": lr} for lr in (0.01, 0.1, 0.001, 0.0001)},
    **ON_CIFAR_20,
)

SENSITIVITY_GRID = Study(
    name="sensitivity_grid",
    source="004",
    question="Which matters most on CIFAR-100: batch size, weight decay or gradient clipping?",
    recipe=CIFAR,
    base={"epochs": 30},
    grid=("batch_size", "weight_decay", "clip_norm"),
    variants=grid(
        {"batch_size": "400", "weight_decay": "1e-4", "clip_norm": "0.1"},
        batch_size=("128", "400", "1024"),
        weight_decay=("0", "1e-4", "1e-3"),
        clip_norm=("0", "0.1", "1"),
    ),
    seeds=(0, 1),
    cpu=CIFAR_20 | {"epochs": 10},
    cpu_title=f"{CIFAR_20_TITLE}, {SMALL_TITLE}, 10 epochs",
    notes="The full study has 30 epochs instead of 120, because 27 combinations are 54 runs. Main effects "
    "compare the values of a flag over the same combinations of the others. `clip-norm` limits each gradient "
    "value; 0 turns clipping off.",
)

AUGMENTATION = Study(
    name="augmentation",
    source="004",
    question="How does each augmentation change the accuracy and the train-validation gap on CIFAR-100?",
    variants={
        "crop+flip+jitter": {},
        "no-crop": {"augment": "flip,jitter:10"},
        "no-flip": {"augment": "padcrop:4,jitter:10"},
        "no-jitter": {"augment": "padcrop:4,flip"},
        "none": {"augment": "none"},
        "with-cutout": {"augment": "padcrop:4,flip,jitter:10,cutout:8"},
        "with-mixup": {"mixup_alpha": 0.2},
        "with-cutmix": {"cutmix_alpha": 1},
    },
    **ON_CIFAR_20,
)

OPTIMIZERS = Study(
    name="optimizers",
    source="004",
    question="Which optimizer trains best on CIFAR-100, each at one usual, untuned setting?",
    variants={
        "adam": {},
        "sgd": SGD | {"weight_decay": 5e-4},
        "rmsprop": {"optimizer": "rmsprop", "momentum": 0.9, "lr": 0.001},
        "adamw": {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.05},
        "lamb": {"optimizer": "lamb", "lr": 0.008, "weight_decay": 0.02},
        "muon": {"optimizer": "muon", "lr": 0.003, "weight_decay": 0.05},
    },
    **ON_CIFAR_20,
    notes="Each optimizer has one learning rate and weight decay, not tuned: a low score judges this "
    "setting, not the optimizer.",
)

SCHEDULES = Study(
    name="schedules",
    source="004",
    question="OneCycle, step decay, cosine annealing or warm restarts on CIFAR-100?",
    base=SGD | {"weight_decay": 5e-4},
    variants={
        "onecycle": {},
        "step": {"schedule": "step"},
        "cosine": {"schedule": "cosine", "warmup_epochs": 5},
        "restarts": RESTARTS,
        "constant": {"schedule": "constant"},
    },
    cpu_variants={"cosine": {"schedule": "cosine", "warmup_epochs": 1}},
    **ON_CIFAR_20,
    notes="SGD instead of the document's Adam, because the schedules were designed for it.",
)

IMAGENET100 = UNREGULARIZED | {"dataset": "imagenet100", "arch": "resnet50", "augment": "basic"}
IMAGENET100 |= {"lr": 1e-3, "weight_decay": 0.02}

BLURPOOL = Study(
    name="blurpool",
    question="What does antialiased downsampling (BlurPool) gain, and what does it cost?",
    base=IMAGENET100 | {"epochs": 30, "batch_size": 256, "resize_schedule": [128]},
    variants={"maxpool": {}, "blurpool": {"use_blurpool": True}},
    cpu=TINY_20 | {"width": 16, "stem": "imagenet", "resize_schedule": [64], "epochs": 10},
    cpu_title=f"{TINY_20_TITLE}, 64 px, ResNet-18 of width 16, 10 epochs",
    published_scores={"blurpool": "+0.5 to +1 points on ImageNet (Composer; timm, 300 epochs)"},
)

# The sum of epochs x px^2 agrees within 3 %; a test checks it. Multiply-adds differ more where maps round up.
RESIZE_SCHEDULES = Study(
    name="resize_schedules",
    question="At equal compute, is progressive resizing better than one size, and with which sizes?",
    base=IMAGENET100,
    variants={
        "one-size-last": {"resize_schedule": [224], "epochs": 20, "batch_size": 128},
        "one-size-middle": {"resize_schedule": [160], "epochs": 38, "batch_size": 128},
        "progressive": {"resize_schedule": [64, 128, 224], "epochs": 36, "phase_epochs": [12, 8, 16]}
        | {"phase_batch_sizes": [128, 128, 128]},
        "progressive-narrow": {"resize_schedule": [128, 160, 192], "epochs": 37}
        | {"phase_epochs": [12, 12, 13], "phase_batch_sizes": [128, 128, 128]},
    },
    cpu=TINY_20 | {"batch_size": None},
    cpu_variants={
        "one-size-last": {"resize_schedule": [32], "epochs": 10, "batch_size": 128},
        "one-size-middle": {"resize_schedule": [24], "epochs": 18, "batch_size": 128},
        "progressive": {"resize_schedule": [16, 24, 32], "epochs": 17, "phase_epochs": [7, 4, 6]}
        | {"phase_batch_sizes": [128, 128, 128]},
        "progressive-narrow": {"resize_schedule": [20, 24, 28], "epochs": 18, "phase_epochs": [6, 6, 6]}
        | {"phase_batch_sizes": [128, 128, 128]},
    },
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, as much compute as 10 epochs at 32 px",
    notes="Each variant is scored at its own last size. `python validate.py CHECKPOINT --image-sizes 224` "
    "scores them all at one size.\n"
    "The batch size stays the same at all sizes: halving it, as document 002 does, would be a second "
    "change.",
)

DROP_PATH_RATE = Study(
    name="drop_path_rate",
    question="Which drop-path rate suits a short run, and how does it change the train-validation gap?",
    base=TINY_IMAGENET | {"augment": "basic", "mixup_alpha": 0.2, "cutmix_alpha": 1, "ema": False},
    variants={str(rate): {"drop_path_rate": rate} for rate in (0, 0.05, 0.1, 0.2)},
    cpu=TINY_20,
    cpu_title=f"{TINY_20_TITLE}, 32 px, {SMALL_TITLE}, 12 epochs",
    published_scores={
        "0.1": "+0.4 points on ImageNet (Composer)",
        "0.2": "the default of 002; 1.1 points lost in 000's notebooks",
    },
)

EMA = Study(
    name="ema",
    source="000",
    question="Why does a plain EMA with decay 0.9999 stay at chance in a short run, and what avoids it?",
    base=TINY_IMAGENET | {"augment": "basic", "drop_path_rate": 0},
    variants={"ramp-0.9999": {}, "plain-0.9999": {"ema_ramp": False}, "half-life": {"ema_half_life": 1}},
    metric="ema_val_top1",
    published="The first EMA attempt failed (accuracy stuck at 0.5 %) because its decay was badly tuned; "
    "later EMA weights scored better in validation. Decay 0.9999.",
    published_scores={"plain-0.9999": "0.5 %: the first attempt, stuck at chance"},
    notes="After n steps a plain average still holds a share decay^n of the random initial weights: at "
    "0.9999, 90 % after 1,000 steps and 31 % after 11,700 steps (30 epochs of Tiny ImageNet at batch size "
    "256).\n"
    "The average does not affect training: with the same seed, the raw weights of all variants are equal.",
    cpu=TINY_20,
    cpu_variants={"half-life": {"ema_half_life": 0.25}},
    cpu_title=f"{TINY_20_TITLE}, 32 px, {SMALL_TITLE}, 12 epochs",
)

STORED_SIDES = Study(
    name="stored_sides",
    question="Does training on images stored near their training size cost accuracy?",
    base=IMAGENET100 | {"epochs": 36, "batch_size": 256, "resize_schedule": [64, 128, 224]},
    variants={
        "full-size": {},
        "1.5-times": {"data_dir": "{data}-packed-96-192-320"},
        "1.2-times": {"data_dir": "{data}-packed-80-160-256"},
        "training-sizes": {"data_dir": "{data}-packed-64-128-224"},
    },
    cpu=TINY_20 | {"resize_schedule": [16, 24, 32]},
    cpu_variants={
        "1.5-times": {"data_dir": "{data}-packed-24-36-46"},
        "1.2-times": {"data_dir": "{data}-packed-20-30-37"},
        "training-sizes": {"data_dir": "{data}-packed-16-24-32"},
    },
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, 12 epochs",
    notes="Pack the data first: `python pack_dataset.py --dataset imagenet100 --data-dir DATA "
    "--stored-sides 96,192,320 --out DATA-packed-96-192-320`, and likewise for the other two. A phase "
    "reads the smallest copy of 1.25 times its size or more, or the largest: with copies of just the "
    "training sizes, only the last phase reads its own size.",
)

WEIGHTS = {"init_from": "checkpoints/ablation/weights/best_resnet18_tiny-imagenet.pt", "reset_head": True}
SMALL_WEIGHTS = WEIGHTS | {"init_from": "checkpoints/ablation/weights-cpu/best_resnet18_tiny-imagenet.pt"}

FINETUNE = Study(
    name="finetune",
    question="20 classes with 50 photographs each: from scratch, or from weights for 100 other classes?",
    base={"dataset": "tiny-imagenet", "class_list": "ablation_runs/finetune/twenty.txt", "epochs": 30}
    | {"subset": True, "subset_size": 1000, "arch": "resnet18", "stem": "small", "resize_schedule": [64]}
    | {"batch_size": 32, "schedule": "cosine", "warmup_epochs": 0, "lr": 1e-3, "weight_decay": 0.01}
    | {"augment": "basic", "mixup_alpha": 0, "cutmix_alpha": 0, "drop_path_rate": 0, "ema_half_life": 1},
    variants={
        "scratch": {},
        "whole": WEIGHTS,
        "head-first": WEIGHTS | {"freeze_epochs": 5},
        "head-first-slow": WEIGHTS | {"freeze_epochs": 5, "backbone_lr": 0.1},
        "head-only": WEIGHTS | {"freeze_epochs": 30},
    },
    metric="ema_val_top1",
    cpu={"width": 16, "resize_schedule": [32], "holdout": 1000},
    cpu_variants={
        "whole": SMALL_WEIGHTS,
        "head-first": SMALL_WEIGHTS | {"freeze_epochs": 5},
        "head-first-slow": SMALL_WEIGHTS | {"freeze_epochs": 5, "backbone_lr": 0.1},
        "head-only": SMALL_WEIGHTS | {"freeze_epochs": 30},
    },
    cpu_title="20 classes of Tiny ImageNet (1,000 + 1,000 held out + 1,000 images), 32 px, ResNet-18 of "
    "width 16, 30 epochs",
    notes="Train the weights first, on 100 classes of which none is among the 20: `python train.py --config "
    "ablation_runs/finetune/weights.yaml --data-dir DATA --save-dir checkpoints/ablation/weights`. For the "
    "CPU preset, add `--width 16 --resize-schedule 32 --epochs 8`, and take `weights-cpu` for `weights`.",
)

WEAK, MEDIUM, STRONG = (f"rrc,flip,randaugment:{magnitude}" for magnitude in (1, 5, 9))

PHASE_AUGMENT = Study(
    name="phase_augment",
    question="Progressive resizing: does an augmentation that grows with the image size beat a fixed one?",
    base=TINY_IMAGENET | {"resize_schedule": [64, 128, 224], "mixup_alpha": 0, "cutmix_alpha": 0},
    variants={
        "strong": {"augment": STRONG},
        "medium": {"augment": MEDIUM},
        "weak-to-strong": {"phase_augment": [WEAK, MEDIUM, STRONG]},
    },
    metric="ema_val_top1",
    cpu=TINY_20 | {"resize_schedule": [16, 24, 32]},
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, 12 epochs",
    published_scores={"weak-to-strong": "part of EfficientTrain++ (arXiv 2405.08768)"},
    notes="All variants see the same sizes for the same number of epochs: equal compute. All have stochastic "
    "depth of 0.2 and label smoothing of 0.1, and halve the batch with each size.",
)

RECALIBRATE_BN = Study(
    name="recalibrate_bn",
    question="Should the average's BatchNorm statistics be re-estimated before it is scored?",
    base=TINY_IMAGENET | {"augment": "basic", "mixup_alpha": 0, "cutmix_alpha": 0, "drop_path_rate": 0},
    variants={
        "end": {"resize_schedule": [64, 128, 224], "phase_epochs": [10, 10, 10]},
        "after-switch": {"resize_schedule": [64, 128, 224], "epochs": 21, "phase_epochs": [10, 10, 1]},
        "one-size": {},
    },
    metric="ema_val_top1",
    scoring=("--recalibrate-bn",),
    cpu=TINY_20,
    cpu_variants={
        "end": {"resize_schedule": [16, 24, 32], "phase_epochs": [4, 4, 4]},
        "after-switch": {"resize_schedule": [16, 24, 32], "epochs": 9, "phase_epochs": [4, 4, 1]},
    },
    cpu_title=f"{TINY_20_TITLE}, 16 to 32 px, {SMALL_TITLE}, 12 epochs",
    notes="The comparison is within each run: the same weights with both statistics. `after-switch` ends one "
    "epoch after the last change of the image size.",
)

PIPELINE = Study(
    name="pipeline",
    question="Do the built-in operations train as well as the same pipeline in Albumentations?",
    base=TINY_IMAGENET | {"mixup_alpha": 0, "cutmix_alpha": 0, "drop_path_rate": 0},
    variants={
        "built-in": {"augment": "full"},
        "albumentations": {"augment": "rrc,recipes/augment/full.yaml"},
        "crop-only": {"augment": "rrc"},
    },
    cpu=TINY_20,
    cpu_title=f"{TINY_20_TITLE}, 32 px, {SMALL_TITLE}, 12 epochs",
    notes="`crop-only` shows how large the effect of the whole pipeline is.",
)

SAME_TWICE = Study(
    name="same_twice",
    question="How often does the method of these reports call a variant better or worse than itself?",
    recipe=CIFAR,
    variants={"same": {}},
    seeds=tuple(range(24)),
    cpu=CIFAR_10,
    cpu_title=f"{CIFAR_10_TITLE}, {SMALL_TITLE}, 10 epochs",
    notes="An A/A test: the runs of one variant are dealt out at random 200 times and compared.",
)

STUDIES = {value.name: value for value in tuple(globals().values()) if isinstance(value, Study)}


def find(name: str) -> Study:
    """Return the study called `name`. Raises UsageError if there is none."""
    if name not in STUDIES:
        fix = did_you_mean(name, STUDIES) or f"choose from {', '.join(STUDIES)}"
        raise UsageError(f"unknown study {name!r}", fix)
    return STUDIES[name]
