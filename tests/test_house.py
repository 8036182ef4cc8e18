"""The architecture and the documents: imports point downwards, and README and docs are true."""

import ast
import functools
import re
from pathlib import Path

import pytest
from conftest import ROOT

from base import flags
from base.parser import typed_text

LAYERS = {  # package or module -> its layer; imports point strictly downwards, or stay inside one package
    "base": 0,
    **dict.fromkeys(("data_utils", "ema", "optim", "sources", "models", "harness.interrupts"), 1),
    **dict.fromkeys(("harness.batch_memory", "harness.workers"), 1),
    **dict.fromkeys(
        ("analysis.figures", "analysis.score_figures", "analysis.scores", "analysis.lr_suggestion"), 1
    ),
    **dict.fromkeys(("analysis.feature_maps", "analysis.filter_figures"), 1),
    **dict.fromkeys(
        ("dataloader", "train_utils", "harness.checkpoint", "harness.rundir", "harness.log", "harness.pool"),
        2,
    ),
    "analysis.landscape_figures": 2,
    **dict.fromkeys(("harness.meter", "harness.norms", "analysis.predictions", "analysis.export"), 3),
    **dict.fromkeys(("analysis.gradcam_figures", "analysis.validation"), 3),
    "loop": 4,
    "analysis.lr_range_test": 5,
    **dict.fromkeys(("harness.build", "harness.preflight", "harness.dryrun", "harness.session"), 5),
    "harness.crop_cache": 5,
    **dict.fromkeys(("train", "validate", "predict", "lr_finder", "download_imagenet", "pack_dataset"), 6),
    **dict.fromkeys(("ablation_runs", "benchmarks", "scripts"), 6),
    # Their __init__.py, which imports nothing; and what analysis has besides the parts above are commands.
    **dict.fromkeys(("harness", "analysis"), 0),
}
SCRIPTS = {"train", "validate", "predict", "lr_finder", "download_imagenet", "pack_dataset"}


@functools.cache  # listing the files takes half a second, .venv's among them
def modules() -> dict[str, Path]:
    files = [p for p in ROOT.rglob("*.py") if not {".venv", "tests", ".ci"} & set(p.relative_to(ROOT).parts)]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def layer(name: str) -> int:
    if name.startswith("analysis."):
        return LAYERS.get(name, 6)
    return LAYERS.get(name, LAYERS.get(name.split(".", maxsplit=1)[0], -1))


def imports(name: str, path: Path) -> set[str]:
    """Return the modules of this project that `path` imports, also inside functions."""
    found, package = set(), name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package, node.module])) if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found & modules().keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_downwards(name):
    assert layer(name) >= 0, f"{name} has no layer"
    for other in imports(name, modules()[name]) - {name}:
        inside = other.split(".")[0] == name.split(".")[0] and layer(other) <= layer(name)
        assert inside or layer(other) < layer(name), (
            f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"
        )


def test_imports_have_no_cycle():
    graph = {name: imports(name, path) - {name} for name, path in modules().items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_core_is_short_enough_to_be_read():
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    core = set(re.findall(r"`([\w/]+\.py)`", page[: page.index("Everything else serves it")]))
    assert len(core) == 13
    assert sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in core) <= 3100


def test_the_root_holds_at_most_twelve_modules():
    assert len(list(ROOT.glob("*.py"))) <= 12


@pytest.mark.parametrize("name", sorted(SCRIPTS & modules().keys()))
def test_at_the_top_of_a_script_only_base_is_imported(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
    heavy = {
        n
        for n in names
        if n.split(".")[0] in {"torch", "torchvision", "numpy", "cv2", "PIL", "matplotlib", "sklearn"}
    }
    assert not heavy
    ours = {name for name in names if name.split(".")[0] in {m.split(".")[0] for m in modules()}}
    assert {name.split(".")[0] for name in ours} <= {"base"}


def test_schemas_is_imported_only_where_a_file_is_read():
    for path in modules().values():
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        assert not {"base.schemas", "pydantic"} & (
            names | {n.module for n in top if isinstance(n, ast.ImportFrom)}
        ) or (path.name == "schemas.py"), path


def test_the_flag_table_is_the_parser():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(--[a-z0-9-]+)` \| ?`?([^`|]*?)`? ?\| (.*) \|$", text, re.MULTILINE)
    titles = [title.capitalize() for title in flags.TRAIN_GROUPS]
    assert re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE) == titles
    assert [name for name, *_ in table] == [
        flags.dashed(f.name) for g in flags.TRAIN_GROUPS.values() for f in g
    ]
    found = {name: (default, text) for name, default, text in table}
    for action in flags.train_parser().flags.values():
        default, text = found.pop(action.option_strings[0])
        assert default == typed_text(action.default, getattr(action.type, "separator", ","))
        assert text.startswith(action.help.removesuffix(" (default: %(default)s)"))
        assert all(f"`{choice}`" in text for choice in action.choices or ())
    assert not found


def test_the_documents_flags_have_the_documents_defaults():
    defaults = flags.defaults()
    documents = {
        "epochs": 90,
        "batch_size": 256,
        "lr": 3e-4,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "resume": "",
        "save_dir": "./checkpoints",
        "data_dir": "./data/imagenet",
        "subset": False,
        "subset_size": 10000,
        "num_workers": 8,
        "plot": False,
        "drop_path_rate": 0.2,
        "use_blurpool": False,
    }
    assert {name: defaults[name] for name in documents} == documents


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_tree_names_every_file_and_no_other():
    block = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("```")[1]
    named = set(
        re.findall(
            r"^\s*([\w./-]+\.(?:py|yaml|md|txt|lock|toml|sh)|[\w/]+/|Makefile|LICENSE)\s", block, re.MULTILINE
        )
    )
    files = {p.name for p in ROOT.glob("*.py")} | {
        f"{p.name}/" for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()
    }
    assert files <= {n.lstrip("./") for n in named}
    ours = {path.name for path in modules().values()} | {path.name for path in ROOT.iterdir()}
    ours |= {f"{path.parent.name}/" for path in modules().values()} | {"archives/", "augment/"}
    for name in named:
        assert name in ours or (ROOT / name).exists(), f"docs/house.md names {name}, which is not there"


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target
