"""This process: its rank, whether it prints, its CPU cores. Nothing else reads torchrun's variables."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is the one process of a run that prints and writes files."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def say(text: str) -> None:
    """Print `text` if this is the main process and the text is not empty."""
    if text and is_main():
        print(text, flush=True)


def cores() -> int:
    """Return the number of CPU cores this process may use; under torchrun, its share of them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, found // max(1, int(ranks))) if ranks.isdecimal() else found


def incomplete_ranks() -> str:
    """Return torchrun's variables as text if they are incomplete or contradictory, else ''.

    With half of them set, each process would train a run of its own.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if all(value.isdecimal() for value in given.values()):
        complete = "RANK" in given and "WORLD_SIZE" in given
        if (complete and rank() < world_size()) or all(alone[name] == value for name, value in given.items()):
            return ""
    return ", ".join(f"{name}={value}" for name, value in given.items())


def commit() -> str:
    """Return the git commit of this code, with a + if files have changed; $GIT_COMMIT if that is set."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    import subprocess  # not needed behind --help

    git = ["git", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=5).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.TimeoutExpired):
        head = changes = ""
    return head + ("+" if changes else "")


def versions() -> str:
    """Return the versions of this code, of torch and of Python as a line; torch is not imported."""
    from importlib import metadata

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ours = re.search(r'^name = "(.+)"\nversion = "(.+)"$', text, re.MULTILINE).groups()
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    at = f" (commit {here})" if (here := commit()) else ""
    return f"{' '.join(ours)}{at}, torch {torch}, Python {sys.version.split()[0]}"
