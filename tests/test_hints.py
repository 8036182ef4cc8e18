"""Errors name what was meant: a flag, a choice, a recipe, a path; and the command that a flag belongs to."""

import importlib
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from base import errors, flags, parser, process
from base.errors import DataError, UserError, nearest_path
from sources import layouts

COMMANDS = ("train", "validate", "predict", "lr_finder", "pack_dataset", "download_imagenet")
MODULES = sorted(
    f"{folder}.{path.stem}"
    for folder in ("analysis", "ablation_runs", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "def build_parser(" in path.read_text()
)


def parser_of(name: str) -> parser.Parser:
    return importlib.import_module(name).build_parser()


def refusal(*arguments: str) -> UserError:
    with pytest.raises(UserError) as caught:
        train.main([*arguments])
    return caught.value


@pytest.mark.parametrize("arguments, fix", [
    ("--drop-path=0.1", "did you mean --drop-path-rate?"), ("--learning-rat 1", "did you mean --lr?"),
    ("--model resnet18", "did you mean --arch?"), ("--batchsize 8", "did you mean --batch-size?"),
    ("--arch ResNet51", "did you mean resnet50?"), ("--amp bf17", "did you mean bf16?"),
    ("--tta flip", "--tta is a flag of validate.py"), ("docs", "did you mean --data-dir docs?"),
    ("--no-such-flag", "run python train.py --help"), ("--config digit", "did you mean digits.yaml?"),
    ("--config recipes/digit.yaml", "did you mean digits.yaml?"),
    ("--dataset cifar", "did you mean cifar10?"), ("--dataset docs", "did you mean --data-dir docs?"),
    ("--data-dir docs/picture", "did you mean docs/pictures?"),
    ("--init-from READM.md --dataset digits", "mean README.md?"),
    ("--resume READM.md", "did you mean README.md?"), ("--augment recipe/x.yaml", "name a file"),
    ("--augment recipe/augment/full.yml", "did you mean recipes/augment/full.yaml?"),
])  # fmt: skip
def test_the_fix_names_what_was_meant(arguments, fix, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert fix in refusal(*arguments.split()).fix


def test_a_flag_of_train_py_alone_is_named_by_lr_finder():
    with pytest.raises(UserError) as caught:
        parser_of("lr_finder").given(["--dry-run"])
    assert caught.value.fix == "--dry-run is a flag of train.py"


def test_the_hint_to_pack_keeps_the_choice_of_data(photos, tmp_path):
    from harness import build

    listed = tmp_path / "two classes.txt"
    listed.write_text("cat\ndog\n")
    words = [f"--data-dir={photos}", "--dataset=imagenet100", f"--class-list={listed}"]
    config, _ = flags.parse(flags.train_parser(), words)
    index = layouts.open_dataset("imagenet100", photos, class_list=str(listed))
    command = shlex.split(build.packing_hint(config, index).split(": ")[1].split(", then")[0])
    assert command[2:-2] == ["--data-dir", str(photos), "--dataset=imagenet100", f"--class-list={listed}"]
    config, _ = flags.parse(flags.train_parser(), [f"--data-dir={photos}"])
    assert f"--data-dir {photos} --out {photos}-packed," in build.packing_hint(config, index)


def test_a_misspelt_step_key_or_name_is_found(tmp_path):
    assert "did you mean flip?" in refusal("--augment", "flp").what
    (tmp_path / "flags.yaml").write_text("weight_decai: 1")
    assert "did you mean weight-decay?" in refusal("--config", str(tmp_path / "flags.yaml")).fix


def test_a_recipe_is_found_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.yaml"):
        assert parser_of("train").given(["--config", name]) == {"config": name}
        assert train.flags.parse(parser_of("train"), ["--config", name])[0].dataset == "digits"
    (tmp_path / "digits").write_text("dataset: cifar10")
    assert train.flags.parse(parser_of("train"), ["--config", "digits"])[0].dataset == "cifar10"


def test_without_data_the_error_names_what_needs_none_and_the_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        layouts.open_dataset("imagenet", "./data/imagenet")
    assert (
        "--dataset digits" in caught.value.fix
        and "download_imagenet.py --dataset cifar10" in caught.value.fix
    )


def test_the_nearest_path_corrects_each_part_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    assert nearest_path("Photo/trian") == "did you mean photos/train? "
    assert nearest_path(tmp_path / "fotos" / "train") == f"did you mean {tmp_path / 'photos' / 'train'}? "
    assert nearest_path("photos/xyz") == nearest_path("data") == nearest_path("photos/train/x/y") == ""


def test_what_belongs_elsewhere_or_has_another_name_is_true():
    ours = parser_of("train").flags
    assert {train.flags.dashed(name) for name in ours} >= set(parser.OTHER_NAMES.values())
    for command, theirs in parser.ELSEWHERE.items():
        known = parser_of(command.removesuffix(".py"))._option_string_actions
        assert (
            set(theirs) <= known.keys() and not set(theirs) & parser_of("train")._option_string_actions.keys()
        )


@pytest.mark.parametrize("name", [*COMMANDS, *MODULES])
def test_help_names_the_command_its_defaults_and_nothing_internal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parser_of(name).parse_args(["--help"])
    said = capsys.readouterr().out
    started = f"python {name}.py" if name in COMMANDS else f"python -m {name}"
    assert said.startswith(f"usage: {started} [flags]") and "--version" in said
    assert not any(word in said for word in ("default: None", "SUPPRESS", "==", "lambda"))
    assert said.count("(default: ./data/imagenet)") <= (
        name in ("train", "lr_finder", "pack_dataset", "analysis.batch")
    )


def test_the_version_is_printed_without_importing_torch(capsys):
    with pytest.raises(SystemExit) as caught:
        parser_of("predict").parse_args(["--version"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("resnet50-trainer 0.1.0") and ", torch 2." in said and process.commit() in said
    code = "import sys, train\nsys.argv = ['train.py', '--version']\ntry:\n    train.main()\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_python_without_our_packages_is_told_how_to_get_them(capsys):
    def main(argv):
        import no_such_package  # noqa: F401

    assert errors.run(main) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: {sys.executable} has no package no_such_package"
    assert "make setup" in said[1] and "requirements.txt" in said[1]


@pytest.mark.parametrize("command", ["wheel --no-deps .", "install --no-deps .", "install --no-deps -e ."])
def test_pip_says_in_one_line_what_to_do_instead(command, tmp_path):
    pytest.importorskip("pip")
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*pip, *command.split(), "--no-index"], **options)
    said = [line for line in done.stderr.splitlines() if "make setup" in line]
    assert done.returncode and said and "requirements.txt" in said[0] and "Traceback" not in done.stderr


def test_a_missing_module_of_ours_is_a_bug_and_shows_where():
    def main(argv):
        import base.no_such_module  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        errors.run(main)


@pytest.mark.parametrize("command, words", [
    (["train.py", "--dataset", "synthetic", "--stop-after", "1"], "loading the data and torch"),
    (["predict.py", "README.md", "x.jpg"], "loading torch and README.md"),
])  # fmt: skip
def test_a_command_says_what_it_does_before_torch_is_imported(command, words, tmp_path):
    """torch is replaced by a module that ends the process."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(9)")
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], env={"PYTHONPATH": str(tmp_path)}, **options)
    assert done.returncode == 9 and done.stderr == f"{words} ...\n"
