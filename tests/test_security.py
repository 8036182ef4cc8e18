"""No code from files: what may unpickle, evaluate, run a shell, unpack or use the network, and where."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads",
    "shelve.open", "torch.load", "torch.save", "torch.hub.load", "torch.hub.load_state_dict_from_url",
    "torch.jit.load", "shutil.unpack_archive", "ssl._create_unverified_context", "tempfile.mktemp",
    "urllib.request.urlretrieve", "pandas.read_pickle",
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of archives: download_imagenet writes its members itself, one by one
# (file, what): the exceptions, each with its reason in the file.
ALLOWED = {
    ("harness/checkpoint.py", "torch.load"),  # only with weights_only=True: the next test
    ("harness/checkpoint.py", "torch.save"),
    ("base/schemas.py", "eval"),  # the name of a checkpoint's field
    ("sources/cifar.py", "pickle.Unpickler"),  # a subclass that builds NumPy arrays only
}


def shipped() -> list[Path]:
    files = ROOT.rglob("*.py")
    return [p for p in files if not {".venv", "tests", ".ci"} & set(p.relative_to(ROOT).parts)]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def findings(source: str) -> set[str]:
    """Return the calls in a source text that could run what they read."""
    found, names = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = dotted(node).partition(".")
            name = names.get(head, head) + ("." + rest if rest else "")
            found |= {name} & FORBIDDEN
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                found.add(node.func.attr)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {
                    ("shell", True),
                    ("weights_only", False),
                    ("allow_pickle", True),
                    ("verify", False),
                    ("trust_remote_code", True),
                }:
                    found.add(f"{keyword.arg}={value}")
    return found


@pytest.mark.parametrize("path", shipped(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    name = str(path.relative_to(ROOT))
    assert not {what for what in findings(path.read_text(encoding="utf-8")) if (name, what) not in ALLOWED}


def test_every_torch_load_reads_weights_only():
    tree = ast.parse((ROOT / "harness/checkpoint.py").read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    assert {k.arg: getattr(k.value, "value", None) for k in calls[0].keywords}["weights_only"] is True


@pytest.mark.parametrize("source, what", [
    ("import os\nos.system('x')", "os.system"), ("from os import system as s\ns('x')", "os.system"),
    ("import pickle as p\np.loads(b'')", "pickle.loads"), ("eval('1')", "eval"), ("run = exec", "exec"),
    ("import torch\ntorch.load('x')", "torch.load"), ("tar.extractall('.')", "extractall"),
    ("subprocess.run('x', shell=True)", "shell=True"),
    ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=True"),
    ("from torch import load\nload('x')", "torch.load"), ("import yaml\nyaml.load('x')", "yaml.load"),
])  # fmt: skip
def test_forbidden_calls_are_found(source, what):
    assert findings(source) == {what}


def test_no_pickles_or_caches_in_the_repository():
    odd = {".pkl", ".pickle", ".npy", ".pyc", ".joblib", ".tar", ".so"}
    files = [
        p
        for p in ROOT.rglob("*")
        if not {".venv", ".git", "__pycache__", "data", "checkpoints", "runs", "benchmark-results"}
        & set(p.relative_to(ROOT).parts)
    ]
    assert not [p for p in files if p.suffix in odd]
