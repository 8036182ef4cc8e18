"""No flag is idle: it changes what its row of flags.TABLE says, or is refused; then it would change nothing.

The tests of each flag in one mode are quick; those of every flag in every mode are slow.
"""

import re
from functools import lru_cache

import pytest
import torch
from inprocess import look
from test_options import OPTIONS

import train
from base import flags
from base.errors import UsageError
from base.idle import never

RECIPE = """{dataset: digits, subset: true, subset-size: 40, arch: resnet_tiny, epochs: 4, seed: 6,
             resize-schedule: [8, 16, 24], batch-size: 16, num-workers: 0, device: cpu, amp: off}"""
HEAD_ALONE = f"--pretrained {__file__} --freeze-epochs 4"
# Flags, each with a mode in which it has no effect: arguments added to RECIPE.
IDLE = [
    ("batch_size", "--phase-batch-sizes 8,8,8"),
    ("clip_mode", "--clip-norm 0"),
    ("lr_scale", "--resize-schedule 16"),
    ("lr_scale", "--phase-batch-sizes 8,8,8"),
    ("lr_scale", "--epochs 1"),  # it goes to the last phase
    ("lr_scale", "--batch-size 1 --arch vit_b_16 --resize-schedule 16"),
    ("phase_mix", "--mixup-alpha 0 --cutmix-alpha 0 --drop-path-rate 0"),
    ("phase_mix", "--mixup-alpha 0 --cutmix-alpha 0 --arch mobilenet_v3_large"),
    ("mixup_alpha", "--phase-mix off,off,off"),
    ("cutmix_alpha", "--phase-mix off,off,off"),
    ("drop_path_rate", "--phase-mix off,off,off"),
    ("drop_path_rate", "--epochs 1 --phase-mix on,on,off"),
    ("phase_mix", f"{HEAD_ALONE} --mixup-alpha 0 --cutmix-alpha 0"),
    ("phase_epochs", "--resize-schedule 16"),
    ("phase_epochs", "--epochs 1"),
    ("nesterov", "--optimizer rmsprop"),
    ("warmup_epochs", "--schedule step"),
    ("cycles", "--schedule cosine --warmup-epochs 1"),
    ("plateau_patience", "--epochs 1"),
    ("plateau_patience", "--eval-every 2"),
    ("bce_threshold", ""),
    ("bce_threshold", "--loss bce --label-smoothing 0 --phase-mix off,off,off"),
    ("label_smoothing", "--loss bce --bce-threshold 0.2 --mixup-alpha 0 --cutmix-alpha 0"),
    ("class_weights", "--loss bce"),
    ("augment", "--phase-augment basic/full/full"),
    ("ema_decay", "--no-ema"),
    ("ema_decay", "--ema-half-life 1"),
    ("ema_ramp", "--no-ema"),
    ("ema_ramp", "--ema-half-life 1"),
    ("ema_half_life", "--no-ema"),
    ("accumulate", "--batch-size 1 --arch vit_b_16 --resize-schedule 16"),
    ("subset_size", "--no-subset"),
    ("split", ""),
    ("class_list", ""),
    ("allow_class_mismatch", ""),
    ("on_bad_image", ""),
    ("on_bad_image", "--dataset synthetic"),
    ("reset_head", ""),
    ("allow_change", ""),
    ("sync_bn", ""),
    ("save_every", "--epochs 1"),
    ("eval_every", "--epochs 1"),
    ("early_stop_patience", "--resize-schedule 16,24 --phase-epochs 3,1"),
]
VALUES = {name: changes for name, (_, changes) in OPTIONS.items()} | {
    "batch_size": ["--batch-size 24"],
    "subset": ["--no-subset"],
    "data_dir": ["--data-dir nowhere"],
    "split": ["--split official"],
    "class_list": ["--class-list missing.txt"],
    "allow_class_mismatch": ["--allow-class-mismatch"],
    "on_bad_image": ["--on-bad-image skip"],
    "phase_mix": ["--phase-mix on,off,off", "--phase-mix off"],
    "phase_epochs": ["--phase-epochs 2,1,1", "--phase-epochs 1,2,1", "--phase-epochs 4"],
    "phase_batch_sizes": ["--phase-batch-sizes 8,4,4", "--phase-batch-sizes 4"],
    "phase_augment": ["--phase-augment none/flip/basic", "--phase-augment flip"],
    "bce_threshold": ["--bce-threshold 0.2"],
    "class_weights": ["--class-weights balanced"],
    "plateau_patience": ["--plateau-patience 1"],
    "reset_head": ["--reset-head"],
    "freeze_epochs": [f"--freeze-epochs 1 --init-from {__file__}"],
    "allow_change": ["--allow-change lr"],
    "ema_ramp": ["--no-ema-ramp"],
    "ema_decay": ["--ema-decay 0"],  # below the first value of the ramp
}
SETTINGS = {"save_every", "eval_every", "early_stop_patience"}  # observed as values, not by their effect
SETTINGS |= {"plateau_patience"}  # observed after more validations than there are
# Every flag is tried in each of these modes. A classifier alone and BCE have gradients too small for 1.
MODES = [
    *sorted({mode for _, mode in IDLE if not re.search("vit|mobilenet|freeze", mode)}),
    "--optimizer sgd", "--optimizer lamb", "--optimizer sgd --nesterov", "--schedule plateau",
    "--schedule constant", "--schedule restarts", "--schedule triangular2 --cycles 2",
    "--loss bce --label-smoothing 0 --clip-norm 0.01", "--accumulate 2", "--augment none",
    "--stem small --head linear",
    "--arch preact_resnet50 --resize-schedule 16", "--clip-mode value", "--phase-mix on,off,off",
    "--no-ema-ramp", "--dataset synthetic:train=60,val=10,size=8", "--l1 0.001", "--seed 7",
]  # fmt: skip
# These change files, output or the choice of the run, but no step: tested in whole runs, here and elsewhere.
WHOLE = {"init_from", "pretrained", "device", "save_dir", "resume", "overwrite", "plot", "log_every",
         "tensorboard", "wandb", "trackio", "summary", "dry_run", "config", "debug",
         "cache_eval"}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "base.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: lambda images: forward(images))


@lru_cache
def seen(recipe: str, arguments: str, checked: bool = True) -> tuple:
    def config():
        config, given = flags.parse(train.build_parser(), ["--config", recipe, *arguments.split()])
        if checked:
            flags.check_train(config, given)
        return config

    try:
        return look(config)
    except ValueError as error:  # not as many entries as phases, which `check_train` refuses
        assert not checked
        return ("refused", str(error))


def is_idle(found: tuple, name: str) -> bool:
    return found[0] == "refused" and f"{flags.dashed(name)} would do nothing" in found[1]


def judge(recipe: str, name: str, mode: str) -> bool:
    """Return whether `name` is refused in `mode`: then no value may change anything, else one must."""
    plain, values = seen(recipe, mode), VALUES[name]
    found = [seen(recipe, f"{mode} {value}") for value in values]
    refused = [is_idle(one, name) for one in found]
    if any(refused):
        free = [seen(recipe, f"{mode} {value}", checked=False) for value in values]
        # A run that the plan, the data or the device refuses shows nothing.
        assert all(no or one[0] == "refused" for no, one in zip(refused, found, strict=True))
        assert name in SETTINGS or all(one == plain or one[0] == "refused" for one in free), (
            f"{name} works under {mode!r}"
        )
    else:
        (row,) = (row for row in flags.TABLE if row.name == name)
        noted = row.unused(config_of(recipe, mode))
        assert noted or any(one != plain for one in found), (
            f"{name} does nothing under {mode!r} and is not refused"
        )
    return any(refused)


def config_of(recipe: str, mode: str):
    return flags.parse(train.build_parser(), ["--config", recipe, *mode.split()])[0]


def test_every_flag_has_a_row_and_a_test():
    actions = train.build_parser().flags.keys()
    assert {row.name for row in flags.TABLE} == actions == VALUES.keys() | WHOLE


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*case, marks=pytest.mark.slow) if "vit" in case[1] else case for case in IDLE],
)
def test_an_idle_flag_is_refused(name, mode, recipe):
    assert judge(recipe, name, mode)


def test_every_predicate_is_met_by_a_mode():
    tried = {name for name, _ in IDLE} | {"use_blurpool", "head", "stem", "width", "init_from"}
    tried |= {"pretrained"}
    tried |= {"dry_run"}
    assert {row.name for row in flags.TABLE if row.idle is not never} <= tried
    noted = {row.name for row in flags.TABLE if row.unused is not never}
    tested = "momentum data_dir drop_path_rate backbone_lr compile early_stop_patience"  # below
    assert noted == set(tested.split())


def refusal(*arguments) -> str:
    config, given = flags.parse(train.build_parser(), [str(a) for a in arguments])
    try:
        flags.check_train(config, given)
    except UsageError as error:
        return f"{error.what} | {error.fix}"
    return ""


@pytest.mark.parametrize(("arguments", "words"), [
    ("--arch vit_b_16 --resize-schedule 32 --use-blurpool --head linear --stem small",
     "--use-blurpool --head --stem"),
    ("--arch swin_t --sync-bn", "--sync-bn has no BatchNorm"),
    ("--resume a.pt --init-from b.pt --reset-head", "--init-from --reset-head loads the weights"),
    ("--resume a.pt --pretrained", "--pretrained loads the weights"), ("--resume auto --pretrained", ""),
    ("--resume auto --init-from b.pt --reset-head", ""),  # the first start of a job that is requeued
    ("--summary --dry-run", "--dry-run only prints"),
    ("--dataset cifar10 --on-bad-image skip --allow-class-mismatch", "--on-bad-image --allow-class-mismatch"),
    ("--dataset hf:a/b --on-bad-image skip", ""),
    ("--class-list a --dataset cifar10", "--class-list"), ("--class-list a --dataset tiny-imagenet", ""),
    ("--split official", "--split needs --dataset tiny-imagenet"),
    ("--split official --dataset tiny-imagenet", ""),
    ("--save-every 2 --epochs 1", "--save-every"), ("--save-every 2min --epochs 1", ""),
])  # fmt: skip
def test_the_message_names_the_idle_flag(arguments, words):
    said = refusal(*arguments.split())
    assert all(word in said for word in words.split()) and bool(said) == bool(words), said


def test_a_packed_copy_has_what_it_was_packed_with(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    for typed in (
        ["--class-list", "x"],
        ["--allow-class-mismatch"],
        ["--split", "70-30", "--dataset", "tiny-imagenet"],
    ):
        assert "packed copy" in refusal("--data-dir", tmp_path, *typed)
    assert not refusal("--data-dir", tmp_path, "--dataset", "cifar10", "--on-bad-image", "skip")


@pytest.mark.parametrize("row", flags.TABLE, ids=lambda row: row.name)
def test_a_preview_accepts_the_flags_of_the_training(row):
    """So that --dry-run or --summary can be added to any command."""
    typed = {
        "init_from": f"--init-from {__file__}",
        "device": "--device cpu",
        "save_dir": "--save-dir a",
        "resume": "--resume auto",
        "wandb": "--wandb a",
        "trackio": "--trackio a",
        "log_every": "--log-every 5",
        "config": "--config digits",
    }.get(row.name)
    typed = (typed or VALUES.get(row.name, [flags.dashed(row.name)])[0]).split()
    for preview in ("--summary", "--dry-run"):
        if row.name not in ("summary", "dry_run"):
            assert refusal(*typed, preview) == refusal(*typed)


def test_one_error_names_all_flags_without_effect():
    said = refusal("--clip-norm", "0", "--clip-mode", "norm", "--dataset", "digits", "--cycles", "3")
    assert "--clip-mode would do nothing" in said and "leave --cycles, --clip-mode out" in said


def test_a_config_file_may_hold_flags_that_only_the_command_line_makes_idle(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("dataset: digits\ncycles: 2\n")
    assert f"--config {file}: cycles would do nothing" in refusal("--config", file)
    assert not refusal(
        "--config", file, "--schedule", "restarts"
    )  # the flag that makes it effective is typed
    file.write_text("dataset: digits\ncycles: 2\nschedule: restarts\n")
    assert not refusal("--config", file, "--schedule", "step")
    assert "--cycles would do nothing" in refusal("--config", file, "--schedule", "step", "--cycles", "4")
    file.write_text("dataset: digits\nplot: false\nnesterov: false\n")
    assert not refusal("--config", file)  # a switch that is off asks for nothing
    assert not refusal("--dataset", "digits", "--no-nesterov")


@pytest.mark.parametrize(("recipe", "typed", "left_out"), [
    ("cifar10_one_hour", "--optimizer adamw", "nesterov"),
    ("tiny_imagenet_resnet18", "--dataset digits", "split"),
    ("a3_100_epochs_160px", "--loss ce", "bce_threshold"),
])  # fmt: skip
def test_a_typed_flag_leaves_out_what_it_makes_idle_in_the_file(recipe, typed, left_out):
    config, given = flags.parse(train.build_parser(), ["--config", recipe, *typed.split()])
    assert getattr(config, left_out) == flags.BY_NAME[left_out].default and left_out not in given
    assert getattr(flags.parse(train.build_parser(), ["--config", recipe])[0], left_out) != getattr(
        config, left_out
    )


def test_a_switch_of_a_file_can_be_turned_off():
    config, given = flags.parse(train.build_parser(), ["--config", "cifar10_one_hour", "--no-nesterov"])
    assert config.nesterov is False and "nesterov" in given and not flags.check_train(config, given)


TOO_PATIENT = ["--epochs=6", "--resize-schedule=16,24", "--early-stop-patience=3"]  # of 3 epochs at 24 px


def test_flags_without_use_that_are_only_noted():
    typed = "--momentum 0.5 --dataset digits --data-dir x --arch mobilenet_v3_large --drop-path-rate 0.1"
    config, given = flags.parse(
        train.build_parser(), [*typed.split(), "--compile", "--cuda-graphs", *TOO_PATIENT]
    )
    notes = " ".join(flags.check_train(config, given))
    noted = ("--momentum", "--data-dir", "--drop-path-rate", "--compile", "--early-stop-patience")
    assert all(f"note: {flag} is not used" in notes for flag in noted)
    for flag in ("--drop-path-rate", "--backbone-lr"):  # a recipe may set them: noted, not refused
        head_alone = ["--pretrained", "--epochs=9", "--freeze-epochs=9", f"{flag}=0.1"]
        (note,) = flags.check_train(*flags.parse(train.build_parser(), head_alone))
        assert note == f"note: {flag} is not used: --freeze-epochs trains the classifier alone"
        head_alone[2] = "--freeze-epochs=8"
        assert not flags.check_train(*flags.parse(train.build_parser(), head_alone))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_flag_in_every_mode_changes_something_or_is_refused(mode, recipe):
    for name in VALUES:
        if f"{flags.dashed(name)} " not in f"{mode} " and f"--no-{flags.dashed(name)[2:]} " not in f"{mode} ":
            judge(recipe, name, mode)
