"""Recipes and --config files: known keys, valid values, and a plan and a model that can be built."""

import re
from pathlib import Path

import pytest
import yaml

import train
from base import flags
from base.errors import UsageError
from models import build_model
from optim import build_optimizer
from optim.schedule import Schedule
from train_utils import plan

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
CLASSES = {"imagenet": 1000, "imagenet100": 100, "tiny-imagenet": 200, "cifar100": 100, "cifar10": 10}
CLASSES |= {"digits": 10}
IMAGES = {
    "imagenet": 1_281_167,
    "imagenet100": 126_689,
    "tiny-imagenet": 100_000,
    "cifar100": 50_000,
    "cifar10": 50_000,
    "digits": 1438,
}


def parsed(*arguments: object):
    return flags.parse(train.build_parser(), [str(a) for a in arguments])


def plan_of(config):
    sizes = {"phase_batch_sizes": config.phase_batch_sizes, "phase_epochs": config.phase_epochs}
    return plan(config.epochs, config.resize_schedule, IMAGES[config.dataset], config.batch_size, **sizes)


def test_the_recipes_of_the_documents_and_the_published_ones_are_there():
    assert {path.stem for path in RECIPES} >= {
        *("digits", "imagenet_documents", "tiny_imagenet", "tiny_imagenet_resnet18", "cifar100_resnet34"),
        *("imagenet100", "a3_100_epochs_160px", "blurpool_160_192"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_parsed_planned_and_built(path):
    config, typed = parsed("--config", path)
    flags.check_train(config, typed)
    assert {key.replace("-", "_") for key in yaml.safe_load(path.read_text())} - {"ema"} <= typed
    phases = plan_of(config)
    assert phases[-1].last_epoch == config.epochs and len(phases) == len(config.resize_schedule)
    model = build_model(
        config.arch,
        num_classes=CLASSES[config.dataset],
        head=config.head,
        stem=config.stem,
        drop_path_rate=config.drop_path_rate,
        width=config.width,
    )
    optimizer = build_optimizer(
        config.optimizer,
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    steps = sum(p.steps for p in phases)
    warmup = round(config.warmup_epochs * phases[0].steps_per_epoch) if config.schedule == "cosine" else 0
    options = {"total_steps": steps, "cycles": config.cycles, "warmup_steps": warmup}
    schedule = Schedule(optimizer, config.schedule, peak_lr=config.lr, **options)
    assert max(schedule.lr_at(step) for step in range(0, steps, 1 + steps // 500)) == pytest.approx(
        config.lr, rel=0.05
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_config_survives_conversion_to_a_command_line_and_back(path):
    config = parsed(
        "--config", path, "--save-every", "15min", "--no-ema-ramp", "--phase-epochs", "3,1,2", "--plot"
    )[0]
    values = flags.plain(config)
    again, given = flags.parse(train.build_parser(), flags.to_argv(values))
    assert flags.plain(again) == values and {"lr", "save_every", "ema_ramp", "plot"} <= given


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_source_and_the_curve_to_expect(path):
    comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Source:" in comments or "arxiv.org" in comments
    assert "Curve" in comments


def test_the_documents_recipe_is_the_defaults():
    recipe, _ = parsed("--config", RECIPES[0].parent / "imagenet_documents.yaml")
    defaults, _ = parsed()
    differ = {k for k, v in flags.plain(defaults).items() if flags.plain(recipe)[k] != v}
    assert differ == {"config", "phase_epochs", "phase_batch_sizes"}
    assert plan_of(recipe) == plan_of(defaults)


def test_typed_sizes_leave_out_the_lists_of_a_file_that_are_for_others():
    path = RECIPES[0].parent / "cifar10_one_hour.yaml"  # with three sizes
    config, given = parsed("--config", path, "--resize-schedule", "32")
    assert (config.phase_epochs, config.phase_batch_sizes, config.phase_augment) == (None, None, None)
    (note,) = [note for note in flags.check_train(config, given) if "ignored" in note]
    assert note.endswith("ignored: --phase-epochs, --phase-batch-sizes, --phase-augment")
    config, given = parsed("--config", path, "--resize-schedule", "16,24,32")
    assert config.phase_epochs and not given.unfit
    config, given = parsed("--config", path, "--resize-schedule", "32", "--phase-epochs", "1,2")
    with pytest.raises(UsageError, match="--phase-epochs has 2 entries; --resize-schedule has 1"):
        flags.check_train(config, given)


def test_the_command_line_wins_over_the_recipe(tmp_path):
    config, typed = parsed("--config", RECIPES[0].parent / "cifar100_resnet34.yaml", "--epochs", "3")
    assert (config.epochs, config.lr, config.optimizer) == (3, 0.01, "adam")
    assert {"epochs", "lr", "optimizer"} <= typed


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning-rate: 1", "unknown key 'learning-rate'"),
        ("lr: -1", "--lr"),
        ("optimizer: adamax", "adamax"),
        ("- lr", "holds no flags"),
        ("lr: [1", "is not YAML"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_reason(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parsed("--config", tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match=r"recipes/ holds .*digits\.yaml"):
        parsed("--config", tmp_path / "absent.yaml")


def test_typed_flags_may_make_a_recipes_flags_idle_but_not_each_other():
    recipe = RECIPES[0].parent / "tiny_imagenet_resnet18.yaml"  # triangular2, with cycles
    config, given = parsed("--config", recipe, "--schedule", "plateau")
    flags.check_train(config, given)
    assert "cycles" not in given and config.cycles == flags.BY_NAME["cycles"].default
    config, given = parsed("--config", recipe, "--schedule", "plateau", "--cycles", 2)
    with pytest.raises(UsageError, match="--cycles would do nothing"):
        flags.check_train(config, given)


@pytest.mark.parametrize(("text", "name", "value"), [
    ("amp: off", "amp", "off"), ("phase_mix: [on, off, on]", "phase_mix", (True, False, True)),
    ("ema: off", "ema", False), ("subset: yes", "subset", True), ("wandb: no", "wandb", ""),
    ("save_every: 15min", "save_every", (15.0, "min")), ("lr: 3e-4", "lr", 3e-4),
    ("epochs: 1_000", "epochs", 1000), ("epochs: 010", "epochs", 10), ("epochs: '5'", "epochs", 5),
    ("wandb: 2024-01-01", "wandb", "2024-01-01"), ("save_dir: 2012", "save_dir", "2012"),
    ("batch-size: &n 8", "batch_size", 8), ("augment: [padcrop:4, flip]", "augment", "padcrop:4,flip"),
    ("resize_schedule: 160", "resize_schedule", (160,)), ("\ufeffepochs: 3", "epochs", 3),
])  # fmt: skip
def test_a_yaml_value_means_what_is_written(text, name, value, tmp_path):
    (tmp_path / "flags.yaml").write_text(text, encoding="utf-8")
    config, given = parsed("--config", tmp_path / "flags.yaml")
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value) and name in given


HOSTILE = {
    "null": b"lr: null", "nothing": b"lr:", "twice": b"lr: 1\nlr: 2",
    "twice spelled": b"batch-size: 1\nbatch_size: 2", "octal": b"epochs: 0o10", "list": b"lr: [1, 2]",
    "nested": b"resize-schedule: [[64]]", "map": b"lr: {a: 1}", "key": b"? [a]\n: 1",
    "latin-1": b"wandb: \xe9", "utf-16": "lr: 1".encode("utf-16"), "tab": b"lr: 1\n\tepochs: 2",
    "NUL": b'wandb: "a\\0b"', "surrogate": b'wandb: "\\ud800"', "raw NUL": b"wandb: a\0b",
    "deep": b"lr: " + b"[" * 5000, "deep maps": b"{lr: " * 5000, "code": b"lr: !!python/name:os.system",
    "itself": b"lr: &x [*x]", "no such anchor": b"lr: *x", "merge": b"<<: {lr: 1}",
    "two": b"lr: 1\n---\nlr: 2", "one value": b"5", "empty": b"", "huge": b"#" * 70_000, "inf": b"lr: .inf",
    "nan": b"lr: .nan", "digits": b"epochs: " + b"9" * 6000, "number for a switch": b"subset: 1",
    "number for a key": b"5: 1", "key yes": b"yes: 1",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_file_that_is_not_a_mapping_of_flags_is_named(name, tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UsageError) as caught:
        parsed("--config", path)
    assert str(path) in caught.value.what and len(caught.value.what) < 400 and "\n" not in caught.value.what


def test_a_folder_is_no_config_file_and_hides_no_recipe(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="Is a directory"):
        parsed("--config", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # the --save-dir of the first start, say
    assert parsed("--config", "digits")[0].dataset == "digits"


def commands() -> list[str]:
    """The flags of every train.py command of README, docs, the Makefile and the epilog."""
    root, found = RECIPES[0].parent.parent, []
    for path in (
        *root.glob("*.md"),
        *root.glob("*/*.md"),
        *root.glob("docs/*.sh"),
        root / "train.py",
        root / "Makefile",
    ):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ").replace("$(RUN)", "checkpoints/digits")
        found += re.findall(r"train\.py((?: --[a-z0-9-]+(?: (?!--)[\w./:=,-]+)?)+)", text)
    return [command for command in found if "--help" not in command]


def test_every_command_that_is_shown_is_accepted():
    assert len(commands()) > 20
    for command in commands():
        flags.check_train(*parsed(*command.split()))
