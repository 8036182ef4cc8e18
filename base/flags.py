"""The flags of train.py, in one table: names, types, defaults, help, and when a flag would have no effect.

`parse` returns a frozen config and the set of flags that were given, because a resumed run takes all
others from its checkpoint. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base import idle, process
from base.config_file import RECIPES, read_recipe
from base.errors import UsageError, nearest_path
from base.idle import NO_DROP_PATH, Given, Reason, never, refuse_idle
from base.parser import (
    AUGMENTS,
    LARGEST,
    Parser,
    Switch,
    above_zero,
    augment_text,
    count_or_share,
    dashed,
    listing,
    mixing_alpha,
    number,
    on_off,
    parse_augment,
    positive,
    save_interval,
    typed_text,
)
from base.phases import fitting_batch

natural, pixels = number(int, 0, LARGEST), number(int, 8, 4096)
from_zero, fraction = number(float, 0), number(float, 0, 1, open_high=True)
share = number(float, 0.01, 1)
DATASETS = "imagenet, imagenet100, tiny-imagenet, cifar100, cifar10, digits, synthetic or hf:<name>"
FINETUNE = RECIPES / "finetune.yaml"
STEPS = ", ".join(name + argument for name, argument in AUGMENTS.items())
ARCHS = ("resnet50", "resnet34", "resnet18", "preact_resnet50", "resnet_tiny", "efficientnet_b0",
         "mobilenet_v3_large", "vit_b_16", "swin_t")  # fmt: skip
OPTIMIZERS = ("adamw", "sgd", "adam", "rmsprop", "lamb", "muon")
CYCLIC = ("restarts", "triangular2")
SCHEDULES = ("onecycle", "cosine", "restarts", "step", "triangular2", "plateau", "constant")

# Flags about where and how a run happens, not about what is learned: they may change on resume.
FREE_ON_RESUME = frozenset({
    "data_dir", "num_workers", "save_dir", "resume", "allow_change", "overwrite", "save_every", "stop_after",
    "plot", "debug", "device", "compile", "cuda_graphs", "tensorboard", "wandb", "trackio", "log_every",
    "config", "dry_run", "summary", "init_from", "reset_head", "allow_class_mismatch", "cache_eval",
})  # fmt: skip
# Of these, the ones that decide what a new run learns.
OF_A_START = frozenset({"data_dir", "init_from", "reset_head"})
# Flags in which two runs of the same training may differ: the data must be the same, its path need not.
SAME_TRAINING = FREE_ON_RESUME - OF_A_START | {"data_dir"}
PHASE_LISTS = ("phase_epochs", "phase_batch_sizes", "phase_mix", "phase_augment")  # an entry for each size


@dataclass(frozen=True)
class Flag:
    """A flag: a row of the table."""

    name: str
    help: str = ""
    kind: Any = Switch  # --x and --no-x; or an argparse type, or a tuple of choices
    default: Any = False
    metavar: str | None = None
    const: Any = None  # the value if the flag is given without one; None: a value is required
    idle: Callable[[Any], Reason] = never  # config -> why the flag would have no effect, which is an error
    unused: Callable[[Any], Reason] = never  # the same, but only a note is printed

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        options = {"default": self.default, "help": self.help}
        if self.kind is Switch:
            options["action"] = Switch
        else:
            options["metavar"] = self.metavar
            options["choices" if isinstance(self.kind, tuple) else "type"] = self.kind
            options |= {"nargs": "?", "const": self.const} if self.const else {}
        group.add_argument(dashed(self.name), **options)


# fmt: off
SOURCE = (
    Flag("data_dir", "Dataset directory, or a packed copy of one.", str, "./data/imagenet", "DIR",
         unused=lambda c: idle.dataset_kind(c) in idle.NO_FILES and f"{c.dataset} needs no directory"),
    Flag("dataset", f"Dataset: {DATASETS}. Your own class folders are imagenet.",
         str, "imagenet", "NAME"),
    Flag("split", "Split of tiny-imagenet; 70-30 pools train and val.",
         ("official", "70-30"), "official", "NAME",
         idle=idle.no_split),
    Flag("class_list", "Use only the classes in this file (imagenet, imagenet100, tiny-imagenet).",
         str, "", "FILE",
         idle=idle.no_class_list),
    Flag("allow_class_mismatch", "Accept a validation set that lacks some classes.",
         idle=idle.classes_known),
)
DATASET = (
    *SOURCE,
    Flag("classes", "Use only the first N classes.", number(int, 2, LARGEST), None, "N"),
    Flag("holdout", "Hold out this number, or share, of the training images, and validate on them "
         "instead of the official set.",
         count_or_share, 0, "N|SHARE"),
    Flag("subset", "Use a fixed, class-balanced subset of the images."),
    Flag("subset_size", "Training images in the subset; validation uses a tenth as many, or with "
         "--holdout all images held out.", positive, 10_000, "N",
         idle=lambda c: not c.subset and "it needs --subset"),
)
LOADING = (
    Flag("augment", f"Augmentation: full, basic, none, or steps in order: {STEPS}, "
         "or a file (.yaml, .json) that Albumentations saved.",
         augment_text, "full", "LIST",
         idle=lambda c: c.phase_augment and "--phase-augment sets that of every phase"),
    Flag("on_bad_image", "What to do about a training image that cannot be decoded; skip counts it "
         "and uses another of its class. A validation image that cannot be decoded always ends the run.",
         ("fail", "skip"), "fail", "ACTION", idle=idle.no_image_files),
    Flag("num_workers", "Loader processes per rank; at most one per core and per batch.",
         number(int, 0, 1024), 8, "N"),
)
MODEL = (
    Flag("arch", "Architecture.", ARCHS, "resnet50", "NAME"),
    Flag("drop_path_rate", "Stochastic depth rate, from 0 in the first block to P in the last.",
         fraction, 0.2, "P",
         idle=lambda c: c.arch not in NO_DROP_PATH and idle.mix_off(c),
         unused=idle.nothing_to_drop),
    Flag("use_blurpool", "Antialiased downsampling (CC BY-NC-SA package, 1.26x the compute).",
         idle=idle.torchvision_arch),
    Flag("head", "Classifier: 1x1 convolution or linear layer.", ("conv", "linear"), "conv", "NAME",
         idle=idle.torchvision_arch),
    Flag("stem", "First layers: small is one 3x3 convolution, for 32 px images; d is that of ResNet-D, with "
         "its average pools in the shortcuts.",
         ("imagenet", "small", "d"), "imagenet", "NAME", idle=idle.torchvision_arch),
    Flag("width", "Channels of a ResNet's first stage, doubled in each later one; by default 64, "
         "or 8 for resnet_tiny.", number(int, 2, 1024), None, "N", idle=idle.torchvision_arch),
    Flag("pretrained", "Start from torchvision's ImageNet weights: the default ones, those of this name, or "
         "a file. Other classes get a new classifier. Without --config, the defaults of the other flags are "
         "those of recipes/finetune.yaml.", str, "", "NAME|FILE", const="DEFAULT",
         idle=idle.weights_resumed),
    Flag("init_from", "Start from these weights (ours or torchvision's).", str, "", "FILE",
         idle=idle.weights_resumed),
    Flag("reset_head", "With --init-from: new classifier, for other classes.",
         idle=lambda c: (not c.init_from and "it needs --init-from") or idle.weights_resumed(c)),
    Flag("freeze_epochs", "Train the classifier alone for the first N epochs; the layers below it "
         "keep their weights and BatchNorm statistics.", natural, 0, "N"),
)
PHASES = (
    Flag("epochs", "Number of epochs, over all phases.", positive, 90, "N"),
    Flag("batch_size", "Global batch size of the first phase, halved from phase to phase; by default "
         "256, or less for fewer than 1,024 images.",
         positive, 256, "N",
         idle=lambda c: c.phase_batch_sizes and "--phase-batch-sizes sets every batch size"),
    Flag("resize_schedule", "Image size of each phase.",
         listing(pixels), (64, 128, 224), "PX,PX,..."),
    Flag("phase_epochs", "Epochs of each phase, scaled to add up to --epochs; by default 30,20,40 "
         "for three phases, else equal parts.",
         listing(positive), None, "N,N,...",
         idle=lambda c: idle.one_phase(c) or (c.epochs == 1 and "the last phase gets the only epoch")),
    Flag("phase_batch_sizes", "Global batch size of each phase.", listing(positive), None, "N,N,..."),
    Flag("phase_mix", "Whether each phase uses MixUp, CutMix and drop-path.",
         listing(on_off), None, "on|off,...", idle=idle.nothing_to_mix),
    Flag("phase_augment", "Augmentation of each phase, instead of --augment, such as "
         "basic/full/full. A file must be in the current directory, because / separates phases.",
         listing(augment_text, "/"), None, "LIST/LIST/..."),
    Flag("accumulate", "Split each rank's batch into K pieces, which takes less memory.", positive, 1, "K",
         idle=idle.single_images),
)
OPTIMIZATION = (
    Flag("optimizer", "Optimizer; muon updates the hidden weight matrices, and AdamW at the same --lr the "
         "rest.", OPTIMIZERS, "adamw", "NAME"),
    Flag("lr", "Peak learning rate of the schedule.", above_zero, 3e-4, "LR"),
    Flag("backbone_lr", "Multiply the learning rate of all layers below the classifier by F.",
         above_zero, 1.0, "F", unused=idle.head_alone),
    Flag("momentum", "Momentum of sgd and rmsprop; it is never cycled.", fraction, 0.9, "M",
         unused=lambda c: c.optimizer not in ("sgd", "rmsprop") and "it is for sgd and rmsprop"),
    Flag("nesterov", "Nesterov momentum, with --optimizer sgd.",
         idle=lambda c: c.optimizer != "sgd" and "it needs --optimizer sgd"),
    Flag("weight_decay", "Weight decay; biases and normalization layers are excluded.",
         from_zero, 1e-4, "W"),
    Flag("schedule", "Learning-rate schedule.", SCHEDULES, "onecycle", "NAME"),
    Flag("warmup_epochs", "Epochs of linear warm-up, with --schedule cosine; unless given, at most "
         "half of --epochs.", from_zero, 5.0, "N",
         idle=lambda c: c.schedule != "cosine" and "it needs --schedule cosine"),
    Flag("cycles", "Cycles of --schedule restarts or triangular2.", positive, 3, "N",
         idle=lambda c: c.schedule not in CYCLIC and "it needs --schedule restarts or triangular2"),
    Flag("plateau_patience", "Divide the learning rate of any schedule by 10 after more than N "
         "validations in a row without a lower loss; by default off, but 4 with --schedule plateau.",
         natural, None, "N", idle=idle.no_plateau),
    Flag("lr_scale", "How the learning rate follows the batch size of a phase.",
         ("none", "sqrt", "linear"), "none", "RULE", idle=idle.one_batch_size),
    Flag("clip_norm", "Largest gradient norm (or value, see --clip-mode); 0 disables clipping.",
         from_zero, 1.0, "G"),
    Flag("clip_mode", "What --clip-norm limits.", ("norm", "value"), "norm", "MODE",
         idle=lambda c: not c.clip_norm and "--clip-norm 0 clips nothing"),
)
REGULARIZATION = (
    Flag("loss", "Cross-entropy, or binary cross-entropy averaged over the classes.", ("ce", "bce"),
         "ce", "NAME"),
    Flag("bce_threshold", "With --loss bce: mixed targets above F become 1, and others 0.",
         fraction, None, "F", idle=idle.no_threshold),
    Flag("class_weights", "Weight of each class in --loss ce: balanced is inversely proportional to "
         "its number of training images; a file has one line per class: its name and its weight.",
         str, "", "balanced|FILE", idle=lambda c: c.loss != "ce" and "it needs --loss ce"),
    Flag("l1", "Factor of an L1 penalty on the weights.", from_zero, 0.0, "L"),
    Flag("label_smoothing", "Label smoothing, applied to the mixed targets.", fraction, 0.1, "E",
         idle=idle.no_smoothing),
    Flag("mixup_alpha", "MixUp with weights from Beta(A, A); 0 disables it.", mixing_alpha, 0.2, "A",
         idle=idle.nothing_mixed),
    Flag("cutmix_alpha", "CutMix with areas from Beta(A, A); 0 disables it.", mixing_alpha, 1.0, "A",
         idle=idle.nothing_mixed),
)
AVERAGE = (
    Flag("ema", "Keep and score an exponential moving average of the weights.", Switch, True),
    Flag("ema_decay", "Decay of the average per step.", fraction, 0.9999, "D",
         idle=idle.decay_unread),
    Flag("ema_ramp", "Let the decay grow with the step n as (1 + n) / (10 + n).", Switch, True,
         idle=idle.decay_unread),
    Flag("ema_half_life", "Half-life of the average, in epochs of mean length; replaces --ema-decay.",
         number(float, 0, 10**6, open_low=True), None, "EPOCHS", idle=idle.no_ema),
)
DEVICE_AND_PRECISION = (
    Flag("device", "Device: auto, cpu, cuda, cuda:1 or mps.", str, "auto", "NAME"),
    Flag("amp", "Mixed precision; auto enables it where it is faster, and off means float32 (TF32 on NVIDIA "
         "GPUs).",
         ("auto", "bf16", "fp16", "off"), "auto", "TYPE"),
)
DEVICE = (
    *DEVICE_AND_PRECISION,
    Flag("seed", "Random seed.", number(int, 0, 2**32 - 1), 0, "N"),
    Flag("compile", "Compile the training forward and backward passes with torch.compile.",
         unused=lambda c: c.cuda_graphs and "--cuda-graphs compiles anyway"),
    Flag("cuda_graphs", "Compile, and launch each pass as one CUDA graph: faster where launching "
         "kernels takes longer than running them (see --dry-run). One GPU only."),
    Flag("deterministic", "Use deterministic kernels only."),
    Flag("sync_bn", "Compute BatchNorm statistics over all ranks.", idle=idle.no_sync),
)
DEBUG = Flag("debug", "Show the traceback of an error.")
SAVING = (
    Flag("save_dir", "Output directory.", str, "./checkpoints", "DIR"),
    Flag("resume", "Resume from a checkpoint; auto picks the newest intact one.",
         str, "", "PATH|auto"),
    Flag("allow_change", "Flags that may differ from those of the resumed run.",
         listing(lambda text: text.lstrip("-").replace("-", "_")), (), "FLAG,...",
         idle=lambda c: not c.resume and "it needs --resume"),
    Flag("overwrite", "Delete the run that --save-dir holds."),
    Flag("save_every", "Save every N epochs. Nmin or Ns: after every epoch, and N minutes or "
         "seconds after the last save.",
         save_interval, (1, "ep"), "N|Nmin|Ns",
         idle=lambda c: c.epochs == 1 and c.save_every[1] == "ep" and "the only epoch is saved anyway"),
    Flag("stop_after", "Save and stop after this step, as a stop signal would.",
         positive, None, "STEP"),
)
SCORING = (
    Flag("eval_every", "Validate every N epochs.", positive, 1, "N",
         idle=lambda c: c.epochs == 1 and "the only epoch is validated anyway"),
    Flag("cache_eval", "Decode each validation image once, and keep its crop in --save-dir until "
         "the run is complete. Prints the disk space it needs first."),
    Flag("eval_size", "Image size to score at in every epoch, instead of that of the phase.",
         pixels, None, "PX"),
    Flag("eval_crop", "Share of the short side that is scored; training without rrc or padcrop "
         "uses it too. By default 0.875, or 1 for data at its native size, such as CIFAR at 32 px.",
         share, None, "F"),
    Flag("eval_flip", "Score the mean logits of each image and its mirror image."),
    Flag("early_stop_patience", "Stop after N validations at the last size without a better score.",
         positive, None, "N", idle=idle.scored_once, unused=idle.too_patient),
)
LOGGING = (
    Flag("plot", "Draw learning curves into --save-dir/plots during training."),
    Flag("log_every", "Log loss, gradient norm, learning rate and speed every N steps; 0: never.",
         natural, 20, "N"),
    Flag("tensorboard", "Log to --save-dir/tensorboard as well."),
    Flag("wandb", "Log to Weights & Biases as well.", str, "", "PROJECT"),
    Flag("trackio", "Log to Trackio, on this machine, as well.", str, "", "PROJECT"),
)
COMMAND = (
    Flag("summary", "Print the layers at every size, then exit."),
    Flag("dry_run", "Print the plan, try a few steps at every size, then exit.",
         idle=lambda c: c.summary and "--summary only prints the layers"),
    Flag("config", "YAML file of flags, or the name of one in recipes/; the command line wins.",
         str, "", "FILE"),
    DEBUG,
)
# fmt: on
TOPICS = {
    "data": DATASET,
    "loading": LOADING,
    "model": MODEL,
    "phases": PHASES,
    "optimization": OPTIMIZATION,
    "loss and regularization": REGULARIZATION,
    "average of the weights": AVERAGE,
    "scoring": SCORING,
    "saving and resuming": SAVING,
    "logging": LOGGING,
    "device": DEVICE,
    "command": COMMAND,
}
BY_NAME = {flag.name: flag for topic in TOPICS.values() for flag in topic}
# What most runs set; `--help` shows these first, in this order.
MOST_USED = ("data_dir", "dataset", "config", "arch", "pretrained", "epochs", "batch_size", "lr", "save_dir",
             "resume", "dry_run")  # fmt: skip


def train_groups(leave_out: Collection[str] = ()) -> dict[str, list[Flag]]:
    """Return the flags of train.py by the group that `--help` shows them in, without those named."""
    first = {"what most runs set": [BY_NAME[name] for name in MOST_USED if name not in leave_out]}
    return first | {
        title: [flag for flag in topic if flag.name not in (*MOST_USED, *leave_out)]
        for title, topic in TOPICS.items()
    }


TRAIN_GROUPS = train_groups()
TABLE = tuple(flag for group in TRAIN_GROUPS.values() for flag in group)
BATCH = Flag("batch_size", "Images per batch.", positive, 64, "N")
_SCORING_AMP = "Mixed precision; auto enables it where it is faster, unless the run was trained in fp32."
# Of commands that only run a model.
INFERENCE = (
    DEVICE_AND_PRECISION[0],
    dataclasses.replace(DEVICE_AND_PRECISION[1], help=_SCORING_AMP),
    BATCH,
    LOADING[-1],
    DEBUG,
)
SAVED_DATA = tuple(dataclasses.replace(flag, default=None) for flag in DATASET)
SAVED_DATA_NOTE = "Flags that are not given come from the checkpoint."


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> argparse._ArgumentGroup:
    """Add a group of flags to `parser` and return it."""
    group = parser.add_argument_group(title)
    for flag in flags:
        flag.add_to(group)
    return group


def build_parser(
    prog: str, description: str, epilog: str = "", groups: Mapping[str, Sequence[Flag]] | None = None
) -> Parser:
    parser = Parser(prog=prog, description=description, epilog=epilog)
    for title, flags in (groups or {}).items():
        add_flags(parser, title, flags)
    return parser


def hidden(flag: Flag) -> Flag:
    """Return a flag that is accepted but not shown in `--help`."""
    return dataclasses.replace(flag, help=argparse.SUPPRESS)


def train_parser() -> Parser:
    return build_parser("train.py", "", groups=TRAIN_GROUPS)


def defaults() -> dict[str, Any]:
    """Return the default of every flag of train.py."""
    return {flag.name: flag.default for flag in TABLE}


def parse(parser: Parser, argv: list[str] | None) -> tuple[Any, Given]:
    """Return the frozen config and the names of the flags that were given. Raises UsageError."""
    by_hand = parser.given(argv)
    recipe = read_recipe(parser, by_hand["config"], defaults()) if by_hand.get("config") else {}
    if by_hand.get("init_from"):
        recipe.pop("pretrained", None)
    sizes = by_hand.get("resize_schedule")
    unfit = [
        n for n in PHASE_LISTS if sizes and n not in by_hand and len(recipe.get(n) or sizes) != len(sizes)
    ]
    recipe = {name: value for name, value in recipe.items() if name not in unfit}
    finetunes = bool(by_hand.get("pretrained")) and not recipe
    usual = parser.defaults() | (finetuning(parser, by_hand) if finetunes else {})
    without_use = made_idle(usual, recipe, by_hand)
    recipe = {name: value for name, value in recipe.items() if name not in without_use}
    given = Given(recipe | by_hand)
    given.by_hand, given.unfit, given.finetunes = frozenset(by_hand), tuple(unfit), finetunes
    return make_config(with_short_warmup(usual | recipe | by_hand, given)), given


def with_short_warmup(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return `values` with at most half of the epochs for the warm-up, unless its length is among `given`."""
    if values.get("schedule") != "cosine" or "warmup_epochs" in given:
        return values
    return values | {"warmup_epochs": min(values["warmup_epochs"], values["epochs"] / 2)}


def made_idle(usual: Mapping[str, Any], recipe: Mapping[str, Any], by_hand: Mapping[str, Any]) -> set[str]:
    """Return the flags of the --config file `recipe` that a typed flag leaves without effect.

    They are left out: `--config cifar10_one_hour --optimizer adamw` has no use for `nesterov: true`.
    """
    file = make_config(defaults() | usual | recipe)
    config = make_config(vars(file) | by_hand)
    if not (file.resize_schedule and config.resize_schedule):
        return set()  # `check_train` refuses it
    chosen = [flag for flag in TABLE if flag.name in recipe and flag.name not in by_hand]
    return {flag.name for flag in chosen if flag.idle(config) and not flag.idle(file)}


def finetuning(parser: Parser, by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of all flags with --pretrained: the usual ones are for 90 epochs from scratch."""
    values = read_recipe(parser, str(FINETUNE), defaults())
    epochs = by_hand.get("epochs", values["epochs"])
    return values | {"freeze_epochs": min(values["freeze_epochs"], epochs // 4)}


def fit_to_data(config: Any, given: Given, images: int) -> tuple[Any, str]:
    """Return a new run's config with defaults that fit `images` training images, and what to say about them.

    A value that was given is never changed. What is chosen is saved with the run, so it is kept on resume.
    """
    fitted, to, cores = [], [], process.cores()
    if not given & {"batch_size", "phase_batch_sizes"}:
        ranks, phases = process.world_size(), len(config.resize_schedule)
        batch = fitting_batch(images, phases, ranks, config.batch_size)
        if batch != config.batch_size:
            config = dataclasses.replace(config, batch_size=batch)
            fitted.append(f"batch size {batch}")
            to.append(f"{images:,} images" + f" and {ranks} ranks" * (ranks > 1))
    if "warmup_epochs" not in given and config.warmup_epochs not in (0, defaults()["warmup_epochs"]):
        fitted.append(f"warm-up {config.warmup_epochs:g} epochs")
        to.append(f"{config.epochs} epoch{'s' * (config.epochs > 1)}")
    if "num_workers" not in given and config.num_workers > cores:
        fitted.append(f"{cores} workers")
        to.append(f"{cores} cores")
    notes = [f"note: flags that are not given come from recipes/{FINETUNE.name}"] if given.finetunes else []
    notes += [f"{', '.join(fitted)}: fitted to {', '.join(to)}"] if fitted else []
    return config, "\n".join(notes)


@functools.cache
def config_class(names: tuple[str, ...]) -> type:
    return dataclasses.make_dataclass("TrainConfig", names, frozen=True)


def make_config(values: Mapping[str, Any]) -> Any:
    """Return a frozen dataclass whose attributes are `values`; lists become tuples.

    Of train.py, the attributes are the names in `TABLE`.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return config_class(tuple(fields))(**fields)


def plain(config: Any) -> dict[str, Any]:
    """Return the config as a dict of JSON-ready values: the inverse of `make_config`."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(config).items()}


def to_argv(values: Mapping[str, Any]) -> list[str]:
    """Return the command line of train.py for `values`, {flag: value}."""
    argv = []
    for flag in TABLE:
        value = values.get(flag.name)
        if flag.kind is Switch and value is False:
            argv.append("--no-" + dashed(flag.name).removeprefix("--"))
        elif flag.kind is Switch:
            argv += [dashed(flag.name)] * bool(value)
        elif value not in (None, "", ()):
            argv.append(f"{dashed(flag.name)}={typed_text(value, getattr(flag.kind, 'separator', ','))}")
    return argv


def check_train(config: Any, given: Given) -> list[str]:
    """Return notes to print about the flags. Raises UsageError for flags that cannot work together."""
    if ranks := process.incomplete_ranks():
        raise UsageError(
            f"the environment variables {ranks} do not describe a complete set of ranks",
            "start with torchrun, or unset these variables",
        )
    _check_phases(config)
    if config.arch == "vit_b_16" and config.eval_size and config.eval_size not in config.resize_schedule:
        size = config.resize_schedule[-1]
        raise UsageError(f"vit_b_16 works at one image size only: {size} px here", "leave --eval-size out")
    _check_cuda_graphs(config)
    _check_weights(config)
    notes = refuse_idle(TABLE, config, given)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "leave one of them out")
    if config.schedule == "cosine" and config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves none of {config.epochs} epochs for the cosine",
            "give a smaller --warmup-epochs, or 0",
        )
    if config.nesterov and config.momentum == 0:
        raise UsageError("--nesterov needs a momentum", "give --momentum 0.9")
    unfit = ", ".join(map(dashed, given.unfit))
    unfit = unfit and f"note: --resize-schedule was typed, so these flags of the file are ignored: {unfit}"
    return [*notes, *filter(None, [unfit, workers_note(config, given)])]


def _check_phases(config: Any) -> None:
    sizes = config.resize_schedule
    if not sizes:
        raise UsageError("--resize-schedule is empty", "give at least one size: --resize-schedule 224")
    for name in PHASE_LISTS:
        value = getattr(config, name)
        if value is not None and len(value) != len(sizes):
            raise UsageError(
                f"{dashed(name)} has {len(value)} entries; --resize-schedule has {len(sizes)}",
                "give one entry for each size of --resize-schedule",
            )
    flag = "--phase-augment" if config.phase_augment else "--augment"
    for pixels, text in sorted(
        zip(sizes, config.phase_augment or [config.augment] * len(sizes), strict=True)
    ):
        largest = {"padcrop": pixels - 1, "cutout": 2 * pixels - 1}
        for name, size in parse_augment(text):
            if name == "pipeline" and not os.path.isfile(size):
                fix = nearest_path(size) or "name a file that albumentations.save wrote"
                raise UsageError(f"{flag} {size}: there is no such file", fix)
            if name in largest and size > largest[name]:
                raise UsageError(
                    f"{flag} {name}:{size} leaves nothing of an image of {pixels} px",
                    f"give at most {name}:{largest[name]}, or larger --resize-schedule sizes",
                )


def _check_weights(config: Any) -> None:
    if config.freeze_epochs > config.epochs:
        what = f"--freeze-epochs {config.freeze_epochs} is more than the {config.epochs} epochs"
        raise UsageError(what, "give fewer, or exactly --epochs to train only the classifier")
    if config.freeze_epochs and not (config.pretrained or config.init_from):
        what = f"--freeze-epochs {config.freeze_epochs} would train a classifier on random layers"
        raise UsageError(what, "load their weights with --pretrained or --init-from, or leave it out")
    if config.init_from and config.pretrained:
        what = "--pretrained and --init-from both load weights"
        raise UsageError(what, "leave one of them out")
    if not config.pretrained:
        return
    changed = {"width": config.width, "use_blurpool": config.use_blurpool, "stem": config.stem != "imagenet"}
    if unlike := [dashed(name) for name, given in changed.items() if given]:
        what = f"--pretrained: torchvision has no {config.arch} with {' and '.join(unlike)}"
        raise UsageError(what, f"leave {', '.join(unlike)} out, or --pretrained")


def _check_cuda_graphs(config: Any) -> None:
    if not config.cuda_graphs:
        return
    if config.device in ("cpu", "mps"):
        what = f"--cuda-graphs needs an NVIDIA GPU, and --device is {config.device}"
        raise UsageError(what, "use --no-cuda-graphs")
    if process.world_size() > 1:
        what = "--cuda-graphs works in one process only"
        raise UsageError(what, "use --no-cuda-graphs, with --compile if you like")
    if config.accumulate > 1:  # each replay overwrites the gradients of the one before
        raise UsageError("--cuda-graphs cannot accumulate gradients", "leave one of the two out")


def idle_flags(config: Any) -> set[str]:
    """Return the names of the flags that would have no effect under `config`."""
    return {flag.name for flag in TABLE if flag.idle(config)}


def workers_note(config: Any, given: Given) -> str:
    """Return a note if more loader processes were asked for than there are cores, else ''."""
    workers, cores = config.num_workers, process.cores()
    if "num_workers" not in given or workers <= cores:
        return ""
    return f"--num-workers {workers} is more than the {cores} cores: using {cores}"


def weights_args(config: Any) -> dict[str, Any]:
    """Return the arguments of `sources.archives.pretrained.prepare`."""
    same = ("arch", "pretrained", "init_from")
    return {name: getattr(config, name) for name in same} | {"sizes": config.resize_schedule}


def data_args(config: Any) -> dict[str, Any]:
    """Return the arguments of `sources.layouts.open_dataset`."""
    same = ("dataset", "data_dir", "split", "allow_class_mismatch", "classes", "holdout")
    subset_size = config.subset_size if config.subset else None
    return {name: getattr(config, name) for name in same} | {
        "class_list": config.class_list or None,
        "subset_size": subset_size,
    }
