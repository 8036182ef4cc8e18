"""Every option has an effect: on the plan, the run or a trace of steps. Every value trains and resumes.

The traces take two steps in the first phase and two in the last, of a tiny network on tiny images.
The grid of whole runs is slow: `pytest -m slow tests/test_options.py`.
"""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from inprocess import TINY, built, config_of, hashed, look
from runs import digest

import loop
import train
from base import errors, flags
from base.errors import CheckpointError, UserError
from harness import build, checkpoint, rundir
from harness.log import MetricLogger
from sources import layouts

# name: (what both runs share, what the second one changes); more than one change as a list of them
OPTIONS: dict[str, tuple[str, list[str]]] = {
    "dataset": ("", ["--dataset synthetic:classes=10,train=40,val=10,size=8"]),
    "classes": ("", ["--classes 5"]),
    "holdout": ("", ["--holdout 300", "--holdout 0.3"]),
    "subset": ("", ["--subset-size 41"]),  # TINY has --subset
    "subset_size": ("", ["--subset-size 48"]),
    "augment": ("--augment none", [f"--augment {name}" for name in
                ("rrc", "padcrop:2", "flip", "affine", "jitter", "dropout", "cutout:4", "basic", "full",
                 "randaugment:6", "randaugment:6:0.5", "randaugment:9", "recipes/augment/full.yaml")]),
    "num_workers": ("", ["--num-workers 1"]),
    "arch": ("", ["--arch resnet18"]),
    "drop_path_rate": ("", ["--drop-path-rate 0.6"]),
    "use_blurpool": ("", ["--use-blurpool"]),
    "head": ("", ["--head linear"]),
    "width": ("", ["--width 4"]),
    "stem": ("", ["--stem small", "--stem d"]),
    "epochs": ("", ["--epochs 6"]),
    "resize_schedule": ("", ["--resize-schedule 8,16,20", "--resize-schedule 8,24,24"]),
    "phase_epochs": ("--epochs 9", ["--phase-epochs 5,2,2"]),
    "phase_batch_sizes": ("", ["--phase-batch-sizes 8,8,4"]),
    "phase_mix": ("", ["--phase-mix on,on,off"]),
    "phase_augment": ("", ["--phase-augment none/basic/flip", "--phase-augment flip/none/flip"]),
    "accumulate": ("", ["--accumulate 2"]),
    "optimizer": ("", [f"--optimizer {name}" for name in ("sgd", "adam", "rmsprop", "lamb", "muon")]),
    "lr": ("", ["--lr 1e-3"]),
    "backbone_lr": ("", ["--backbone-lr 0.1", "--backbone-lr 0.5"]),
    "momentum": ("--optimizer sgd", ["--momentum 0.5"]),
    "nesterov": ("--optimizer sgd", ["--nesterov"]),
    "weight_decay": ("", ["--weight-decay 0.1"]),
    "schedule": ("", ["--schedule cosine --warmup-epochs 1", *(f"--schedule {name}" for name in
                 ("restarts", "step", "triangular2", "constant", "plateau"))]),
    "warmup_epochs": ("--schedule cosine --warmup-epochs 1", ["--warmup-epochs 2"]),
    "cycles": ("--schedule triangular2", ["--cycles 2"]),
    "plateau_patience": ("--epochs 6", ["--plateau-patience 1", "--plateau-patience 2"]),
    "lr_scale": ("--phase-batch-sizes 8,8,4", ["--lr-scale sqrt", "--lr-scale linear"]),
    "clip_norm": ("", ["--clip-norm 0.1"]),
    "clip_mode": ("--clip-norm 0.01", ["--clip-mode value"]),
    "loss": ("", ["--loss bce"]),
    "bce_threshold": ("--loss bce", ["--bce-threshold 0.2", "--bce-threshold 0.6"]),
    "class_weights": ("--subset-size 44", ["--class-weights balanced"]),
    "l1": ("", ["--l1 0.001"]),
    "label_smoothing": ("", ["--label-smoothing 0.3"]),
    "mixup_alpha": ("--cutmix-alpha 0", ["--mixup-alpha 0", "--mixup-alpha 5"]),
    "cutmix_alpha": ("--mixup-alpha 0", ["--cutmix-alpha 0", "--cutmix-alpha 5"]),
    "ema": ("", ["--no-ema"]),
    "ema_decay": ("--no-ema-ramp", ["--ema-decay 0.5"]),
    "ema_ramp": ("", ["--no-ema-ramp"]),
    "ema_half_life": ("", ["--ema-half-life 0.5"]),
    "amp": ("--resize-schedule 24,32,32", ["--amp bf16"]),
    "seed": ("", ["--seed 1"]),
    "compile": ("", ["--compile"]),
    "cuda_graphs": ("", ["--cuda-graphs"]),  # refused on a CPU
    "deterministic": ("", ["--deterministic"]),
    "sync_bn": ("", ["--sync-bn"]),  # refused on a CPU
    "save_every": ("", ["--save-every 2"]),
    "stop_after": ("", ["--stop-after 2"]),
    "eval_every": ("", ["--eval-every 2"]),
    "eval_size": ("", ["--eval-size 24", "--eval-size 32"]),
    "eval_crop": ("", ["--eval-crop 1", "--eval-crop 0.5"]),
    "eval_flip": ("", ["--eval-flip"]),
    "early_stop_patience": ("--epochs 4 --phase-epochs 1,1,2", ["--early-stop-patience 2"]),
}  # fmt: skip
# These do not affect steps; other tests cover them.
ELSEWHERE = {"data_dir", "split", "class_list", "allow_class_mismatch", "on_bad_image", "init_from",
             "reset_head", "pretrained", "freeze_epochs", "device", "save_dir", "resume", "allow_change",
             "overwrite", "plot", "log_every", "tensorboard", "cache_eval", "wandb", "trackio",
             "summary", "dry_run", "config", "debug"}  # fmt: skip
SLOW_VALUES = {
    "arch": ["resnet34", "resnet50", "preact_resnet50", "efficientnet_b0", "mobilenet_v3_large", "swin_t"],
    "augment": ["rrc,randaugment", "rrc,trivialaugment"],
}


@lru_cache
def observed(arguments: str) -> tuple:
    return look(lambda: config_of(*arguments.split()))


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: lambda images: forward(images))


def test_every_flag_is_tested_here_or_elsewhere():
    assert train.build_parser().flags.keys() == OPTIONS.keys() | ELSEWHERE | {"batch_size"}
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    quoted = texts.replace(
        texts[texts.index("ELSEWHERE = {") : texts.index("}", texts.index("ELSEWHERE = {"))], ""
    )
    assert [
        name for name in sorted(ELSEWHERE) if flags.dashed(name) not in quoted and f"{name}=" not in quoted
    ] == []


def test_a_trace_is_the_same_twice():
    first = observed("")
    observed.cache_clear()
    assert observed("") == first


@pytest.mark.parametrize("name", OPTIONS)
def test_every_value_changes_what_is_observed(name, uncompiled):
    shared, changes = OPTIONS[name]
    results = [observed(shared)] + [observed(f"{shared} {change}") for change in changes]
    assert all(result[0] != "refused" for result in results) or name in ("sync_bn", "cuda_graphs")
    for k, result in enumerate(results):
        assert result not in results[:k], f"{changes[k - 1]} does nothing, or what another value does"


def test_the_batch_size_is_the_first_phases_and_is_halved():
    def batches(*arguments):
        config, _ = flags.parse(train.build_parser(), ["--dataset", "digits", *arguments])
        return [
            p.batch_size for p in build.make_plan(config, layouts.open_dataset(**flags.data_args(config)), 1)
        ]

    assert batches() == [256, 128, 64] and batches("--batch-size", "40") == [40, 20, 10]


def test_init_from_takes_the_weights_and_nothing_else(tmp_path):
    former = fitted(["--stop-after", "3"], tmp_path / "former")
    path = str(next((tmp_path / "former").glob("last_*.pt")))
    config = config_of("--init-from", path)
    run = built(config, tmp_path)
    build.load_weights(run, config)
    assert hashed(run.state.model) == hashed(run.state.ema.module) == hashed(former.state.model)
    assert run.state.step == 0 and not run.state.optimizer.state

    other = config_of("--init-from", path, "--dataset", "synthetic:classes=7,train=40,val=7,size=8")
    with pytest.raises(UserError):
        build.load_weights(built(other, tmp_path), other)
    reset = config_of(
        "--init-from", path, "--reset-head", "--dataset", "synthetic:classes=7,train=40,val=7,size=8"
    )
    run = built(reset, tmp_path)
    build.load_weights(run, reset)
    assert torch.equal(run.state.model.conv1.weight, former.state.model.conv1.weight)
    assert run.state.model.fc.weight.shape[0] == 7


def test_class_weights_come_from_a_file_or_from_the_counts(tmp_path):
    file, weights = tmp_path / "weights.txt", [0.5 + k for k in range(10)]
    # Notepad begins a file with a byte-order mark.
    file.write_text("\n".join(f"{k} {weights[k]}" for k in reversed(range(10))) + "\n\n", "utf-8-sig")
    run = built(config_of("--class-weights", file), tmp_path)
    assert run.options.loss.keywords["weights"].tolist() == weights
    run = built(config_of("--class-weights", "balanced", "--subset-size", 44), tmp_path)
    found = run.options.loss.keywords["weights"]
    counts = torch.bincount(torch.as_tensor(run.index.train.labels))
    assert sorted(counts.tolist()) == [4] * 6 + [5] * 4
    torch.testing.assert_close(found, 4.4 / counts)


@pytest.mark.parametrize(("text", "problem"), [
    ("0 1\n1 2", "other classes than the data: '2'"), ("0 1\n0 2", "line 2: '0 2'"), ("0 -1", "line 1"),
    ("0 inf", "line 1"), ("0", "line 1"), ("a b", "line 1"), ("cat 1", "other classes"),
    ("\n".join(f"{k} 0" for k in range(10)), "every class the weight 0"), (None, "cannot read"),
])  # fmt: skip
def test_class_weights_that_do_not_fit_are_refused(text, problem, tmp_path):
    file = tmp_path / "weights.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(errors.DataError, match=problem):
        built(config_of("--class-weights", file), tmp_path)


@pytest.mark.parametrize("arguments", [
    "--bce-threshold 0.95 --label-smoothing 0.2", "--bce-threshold 0.01 --label-smoothing 0.2",
])  # fmt: skip
def test_a_threshold_beyond_the_smoothed_targets_is_refused(arguments, tmp_path):
    with pytest.raises(errors.UsageError, match=r"does not separate the targets 0\.02 and 0\.82"):
        built(config_of("--loss", "bce", *arguments.split()), tmp_path)
    run = built(config_of("--loss", "bce", "--bce-threshold", 0.02, "--label-smoothing", 0.2), tmp_path)
    assert run.options.loss.keywords == {"threshold": 0.02}


def test_a_pipeline_that_is_missing_or_changes_the_size_is_refused_before_training(tmp_path):
    for flag in ("--augment rrc,none.yaml", "--phase-augment full/none.yaml/full"):
        with pytest.raises(errors.UsageError, match=r"none\.yaml: there is no such file"):
            config_of(*flag.split())
    path = tmp_path / "crop.yaml"
    crop = "{__class_fullname__: RandomCrop, height: 8, width: 8, p: 1.0}"
    path.write_text(f"transform: {crop}")
    with pytest.raises(
        errors.DataError, match=r"turns uint8 of shape \(16, 16, 3\) into uint8 of shape \(8, 8, 3\)"
    ):
        built(config_of("--augment", path), tmp_path)


@pytest.mark.parametrize("typed", ["--holdout 0.00009", "--holdout 1e-2", "--trackio off", "--wandb no"])
def test_what_was_typed_can_be_read_back_from_a_checkpoint(typed):
    config = config_of(*typed.split())
    name = typed.split()[0].lstrip("-")
    assert rundir.parse_saved_flags(flags.plain(config))[name] == getattr(config, name) not in ("", 0)


def test_a_typed_flag_that_changes_a_resumed_run_needs_allow_change():
    saved = flags.plain(config_of())
    typed = frozenset({"lr"})
    with pytest.raises(CheckpointError, match=r"--lr was 0\.0003, now 0\.1") as caught:
        rundir.resumed_config(config_of("--lr", "0.1"), typed, saved)
    assert "--allow-change lr" in caught.value.fix
    assert (
        rundir.resumed_config(
            config_of("--lr", "0.1", "--resume", "auto", "--allow-change", "lr"), typed, saved
        ).lr
        == 0.1
    )
    assert rundir.resumed_config(config_of("--lr", "0.1"), frozenset(), saved).lr == 3e-4


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", "5"), ("epochs", True), ("epochs", None), ("epochs", [3]), ("epochs", 3.0), ("epochs", -1),
    ("lr", float("nan")), ("lr", "3e-4"), ("resize_schedule", 16), ("resize_schedule", "8,16,24"),
    ("resize_schedule", [[8, 16]]), ("subset", 1), ("subset", "yes"), ("phase_mix", ["on", "off", "on"]),
    ("save_every", 1), ("save_every", [0, "ep"]), ("optimizer", "adamax"), ("dataset", None), ("dataset", {}),
    ("save_dir", "a\0b"), ("augment", ["flip"]), ("augment", "padcrop"), ("wandb", 5),
])  # fmt: skip
def test_a_flag_of_a_wrong_type_in_a_checkpoint_is_refused_and_named(name, value):
    with pytest.raises(
        CheckpointError, match="malformed flags of the saved run: .*" + name.replace("_", "[-_]")
    ):
        rundir.parse_saved_flags(flags.plain(config_of()) | {name: value})


def test_a_list_that_contains_itself_is_refused_quickly():
    knot: list = []
    for _ in range(100):
        knot = [knot, knot]  # 2 ** 100 of them, if all were visited
    with pytest.raises(CheckpointError, match="resize_schedule has the wrong type"):
        rundir.parse_saved_flags({"resize_schedule": knot})


def test_a_checkpoint_of_another_version_lacks_flags_or_has_some_that_are_named():
    saved = flags.plain(config_of("--phase-mix", "on,off,on", "--save-every", "15min", "--lr", "1e-5"))
    assert rundir.parse_saved_flags(saved) == saved
    older = {name: value for name, value in saved.items() if name not in ("l1", "cycles")}
    assert rundir.parse_saved_flags(older) == saved  # at their defaults
    with pytest.raises(CheckpointError, match=r"flags of the saved run.*5, warp") as caught:
        rundir.resumed_config(config_of(), frozenset(), saved | {"warp": 9, 5: 5})
    assert caught.value.exit_code == 4


def test_plot_draws_after_the_first_and_the_last_epoch_of_a_short_run(tmp_path, monkeypatch, capsys):
    drawn, real, instead = [], subprocess.Popen, ["true"]

    class Popen(real):
        def __init__(self, command, **options):
            if "analysis.plots" in command:
                drawn.append(command[-1])
                command = instead
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    arguments = [*TINY, "--save-dir", str(tmp_path)]
    assert train.main(arguments) == 0 and drawn == []
    assert train.main([*arguments, "--overwrite", "--plot"]) == 0 and drawn == [str(tmp_path)] * 2
    assert "WARNING" not in capsys.readouterr().out
    instead[:] = ["sh", "-c", "echo error: no ink >&2; exit 3"]
    assert train.main([*arguments, "--overwrite", "--plot"]) == 0
    assert capsys.readouterr().out.count("WARNING: no plots: error: no ink") == 2


def test_a_plot_that_takes_long_is_not_waited_for(tmp_path, monkeypatch):
    log = MetricLogger(tmp_path, [], 0, plot=True)
    log.drawing = slow = subprocess.Popen(["sleep", "100"], stderr=subprocess.PIPE, text=True)
    try:
        log.draw()
        assert log.drawing is slow and slow.poll() is None
    finally:
        slow.kill()
        slow.wait()
    log.draw()  # the next one is drawn
    assert log.drawing is not slow
    log.close()


def test_debug_shows_where_an_error_comes_from(monkeypatch, capsys):
    def main(argv):
        flags.parse(train.build_parser(), argv)
        raise errors.DataError("no data", "get some")

    for argv, shown in ((["train.py", "--debug"], True), (["train.py"], False)):
        monkeypatch.setattr(sys, "argv", argv)
        assert errors.run(main) == 3
        assert ("Traceback" in capsys.readouterr().err) == shown


def test_the_options_cover_every_choice_of_a_flag():
    for action in train.build_parser().flags.values():
        if action.choices and action.dest in OPTIONS and action.dest not in ("arch", "amp"):
            text = " ".join([OPTIONS[action.dest][0], *OPTIONS[action.dest][1]])
            assert [c for c in action.choices if c != action.default and c not in text] == []


# --- whole runs, slow ----------------------------------------------------------------------------

LEARNS = (
    "--resize-schedule 16,16 --phase-batch-sizes 8,8 --epochs 6 --augment flip --mixup-alpha 0 "
    "--cutmix-alpha 0 --drop-path-rate 0.1 --lr 3e-3"
)
LEARNING_RATE = {
    "--optimizer sgd": "0.1",
    "--optimizer rmsprop": "1e-3",
    "--optimizer lamb": "0.02",
    "--loss bce": "1e-3",
    "--arch efficientnet_b0": "3e-4",
    "--augment rrc,randaugment": "1e-2",
    "--augment rrc,trivialaugment": "1e-2",
}
TRAINED = ("optimizer", "augment", "loss", "head", "stem", "use_blurpool", "accumulate", "clip_mode", "l1",
           "label_smoothing", "ema", "ema_ramp", "ema_half_life", "amp", "nesterov", "seed",
           "deterministic")  # fmt: skip
GRID = [
    *(f"--{flag} {value}" for flag, values in SLOW_VALUES.items() for value in values),
    *(change for name in TRAINED for change in OPTIONS[name][1]),
    *(f"--schedule {name}" for name in flags.SCHEDULES),
    *("--phase-mix on,off --mixup-alpha 0.2", "--lr-scale sqrt --phase-batch-sizes 8,4", "--mixup-alpha 0.2"),
]


def fitted(arguments: list[str], save_dir: Path, resume: bool = False) -> loop.Run:
    save_dir.mkdir(exist_ok=True)
    config = config_of(*arguments)
    run = built(config, save_dir)
    if resume:
        rundir.restore(run, checkpoint.load(next(save_dir.glob("last_*.pt"))), config)
    try:
        loop.fit(run, MetricLogger(save_dir, run.state.rows))
    except loop.StopAfterReached:
        pass
    finally:
        torch.use_deterministic_algorithms(False)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("option", GRID)
def test_every_value_trains_and_resumes_exactly(option, tmp_path):
    arguments = [*LEARNS.split(), *option.split()]
    if option in LEARNING_RATE:
        arguments += ["--lr", LEARNING_RATE[option]]
    if "nesterov" in option:
        arguments += ["--optimizer", "sgd", "--lr", "0.1"]
    if "bf16" in option:
        arguments += ["--resize-schedule", "24,24"]
    if "cosine" in option:
        arguments += ["--warmup-epochs", "1"]
    whole = fitted(arguments, tmp_path / "whole")
    assert whole.state.rows[-1]["train_loss"] < whole.state.rows[0]["train_loss"]
    fitted([*arguments, "--stop-after", "13"], tmp_path / "halves")  # in the middle of an epoch
    fitted(arguments, tmp_path / "halves", resume=True)
    assert digest(tmp_path / "halves") == digest(tmp_path / "whole")


def test_one_value_trains_and_resumes_exactly(tmp_path):
    test_every_value_trains_and_resumes_exactly("--optimizer adam", tmp_path)
