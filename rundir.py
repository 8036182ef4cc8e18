"""One run, one directory: its files, its lock, and which checkpoint it goes on from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from errors import CheckpointError, ResourceError, UsageError
from flags import FREE_ON_RESUME, dashed, from_file, make_config, plain, train_defaults, train_parser

FILES = ("config.json", "env.json", "metrics.jsonl", "wandb_id")
FOLDERS = ("plots", "tensorboard")
DATA_FLAGS = ("data_dir", "dataset", "split", "class_list", "allow_class_mismatch", "subset", "subset_size")


def check(save_dir: str, *, resuming: bool, overwrite: bool) -> None:
    """What can be said about `save_dir` before anything is built; writes nothing.

    Raises UsageError where it holds a run that is neither resumed nor overwritten, or one under way;
    ResourceError where it cannot be written.
    """
    path = Path(save_dir)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "it is read-only" if there.is_dir() else f"{there} is a file"
        raise ResourceError(f"cannot write to --save-dir {path}: {what}", "name a writable directory")
    held = _run_files(path) if path.is_dir() else []
    if held and not (resuming or overwrite):
        raise UsageError(f"{path} already holds a run ({held[0].name})",
                         "go on with --resume auto, start anew with --overwrite, or name another --save-dir")  # fmt: skip
    if (path / ".lock").exists():
        Lock(path).release()


def claim(path: Path, *, overwrite: bool) -> Lock:
    """Make `path` this run's own, prove that files can be written and renamed there, sweep up.

    Raises ResourceError where it cannot be written, UsageError where another run holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        _probe(path / ".probe")
        if overwrite:
            clear(path)
        for half_written in path.glob("*.partial"):
            half_written.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write to --save-dir {path}: {error.strerror}", "name a writable directory"
        ) from None
    return lock


def _probe(file: Path) -> None:
    try:
        with open(file, "wb") as probe:
            probe.write(b"probe")
            os.fsync(probe.fileno())
        os.replace(file, file.with_suffix(".renamed"))
    finally:
        file.unlink(missing_ok=True)
        file.with_suffix(".renamed").unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Delete what a former run left here, and nothing else."""
    for file in _run_files(path):
        file.unlink(missing_ok=True)
    for folder in FOLDERS:
        shutil.rmtree(path / folder, ignore_errors=True)


def _run_files(path: Path) -> list[Path]:
    found = [path / name for name in FILES if (path / name).exists()]
    return found + sorted(path.glob("*.pt")) + sorted(path.glob("*.pt.partial"))


class Lock:
    """Held while a run lives in a directory; the kernel drops it when the process dies, however it dies."""

    def __init__(self, directory: Path):
        import fcntl

        self.file = open(directory / ".lock", "a+")  # noqa: SIM115  (open as long as the run)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            raise UsageError(f"{directory} is in use by {holder}", "wait for it, or name another --save-dir") from None
        except OSError:
            pass  # a cluster filesystem mounted without locks: better a run without one than no run
        self.file.truncate(0)
        self.file.write(f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}")
        self.file.flush()

    def release(self) -> None:
        self.file.truncate(0)
        self.file.close()


def write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_checkpoint(path: str) -> None:
    """Raises CheckpointError where there is no such file: told before torch is imported."""
    if not Path(path).is_file():
        found = ", ".join(sorted(p.name for p in Path(path).glob("*.pt"))) if Path(path).is_dir() else ""
        raise CheckpointError(
            f"no checkpoint at {path}", f"there is {found}" if found else "name a best_*.pt or last_*.pt"
        )


def with_saved_data(config, typed: frozenset[str], saved: dict):
    """`config` with the data flags that were not typed as the checkpoint's run had them."""
    saved = check_saved(saved)
    return make_config({**plain(config), **{name: saved[name] for name in DATA_FLAGS if name not in typed}})


def find_resume(resume: str, save_dir: str, say=print) -> dict | None:
    """The payload of the checkpoint that --resume names; None where `auto` finds an empty directory.

    `auto` takes the newest sound checkpoint and says which it passed over; a PATH is taken or refused.
    """
    if not resume:
        return None
    import checkpoint

    if resume != "auto":
        return checkpoint.load(resume)
    path, passed_over = checkpoint.newest(Path(save_dir)) if Path(save_dir).is_dir() else (None, [])
    for reason in passed_over:
        say(f"passed over {reason}")
    if path is None:
        return None
    say(f"resuming from {path}")
    return checkpoint.load(path)


def resumed_config(config, typed: frozenset[str], saved: dict):
    """The checkpoint's flags with the typed ones laid over; refuses typed ones that change training.

    Raises CheckpointError listing every such flag that --allow-change does not name.
    """
    given = plain(config)
    allowed = {name.strip().lstrip("-").replace("-", "_") for name in config.allow_change}
    unknown = allowed - given.keys() - {"data"}
    if unknown:
        raise UsageError(f"--allow-change: no flag {', '.join(sorted(unknown))}", "name flags as in --help, or 'data'")
    saved = check_saved(saved)
    changed = [name for name in sorted(typed) if name not in FREE_ON_RESUME
               and given[name] != saved[name] and name not in allowed]  # fmt: skip
    if changed:
        listed = "; ".join(f"{dashed(name)} was {_shown(saved[name])}, now {_shown(given[name])}" for name in changed)
        raise CheckpointError(f"these flags would change the resumed run: {listed}",
                              f"leave them out, or accept the change with --allow-change {','.join(changed)}")  # fmt: skip
    # How this start was asked for never comes from the checkpoint.
    asked = {
        *typed,
        "resume",
        "overwrite",
        "allow_change",
        "save_dir",
        "stop_after",
        "dry_run",
        "summary",
        "debug",
        "config",
    }
    return make_config(saved | {name: given[name] for name in asked})


def check_saved(saved: dict) -> dict:
    """The flags of a checkpoint as the parser makes them, those of a later day at their defaults.

    Raises CheckpointError naming flags that this version does not know, or whose values are none.
    """
    parser = train_parser()
    if unknown := sorted(str(name)[:80] for name in saved if name not in {action.dest for action in parser._actions}):
        raise CheckpointError(f"the checkpoint has flags that this version does not know: {', '.join(unknown)}",
                              "update this repository")  # fmt: skip
    try:
        values = train_defaults() | from_file(parser, saved, exact=True)
    except UsageError as error:
        raise CheckpointError(
            f"malformed flags in the checkpoint: {error.what}", "use a checkpoint that train.py wrote"
        ) from None
    return plain(make_config(values))


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def check_fingerprint(saved: dict, now: dict, allowed: tuple[str, ...]) -> str:
    """'' where the data is what it was; a note where a change is allowed; otherwise CheckpointError (R22)."""
    names = {"classes": "the classes", "train": "the training images", "val": "the validation images"}
    changes = []
    for key, words in names.items():
        if saved.get(key) != now[key]:
            count = "num_classes" if key == "classes" else f"num_{key}"
            changes.append(f"{words} ({saved.get(count)} then, {now[count]} now)")
    if not changes:
        return ""
    if "data" in allowed and saved.get("num_classes") == now["num_classes"]:
        return f"note: the data changed: {', '.join(changes)}"
    raise CheckpointError(f"the data is not what this run was trained on: {', '.join(changes)}",
                          "name the same data, or accept the change with --allow-change data")  # fmt: skip


def check_precision(saved: str, now: str, allowed: tuple[str, ...]) -> None:
    if saved != now and "amp" not in allowed:
        raise CheckpointError(f"the run was trained in {saved}, here it would go on in {now}",
                              "set --amp as it was, or accept the change with --allow-change amp")  # fmt: skip


def check_model_args(saved: dict, now: dict) -> None:
    """Raises CheckpointError where the checkpoint's model is another one."""
    names = ("arch", "num_classes", "use_blurpool", "head", "stem")
    if any(saved.get(name) != now[name] for name in names):
        words = [", ".join(f"{name} {args.get(name)}" for name in names) for args in (saved, now)]
        raise CheckpointError(f"checkpoint: {words[0]}; now: {words[1]}",
                              "start a new run from its weights with --init-from and --reset-head")  # fmt: skip


def eval_facts(index, image_size: int) -> dict:
    """What a checkpoint says about feeding its model, so that every tool preprocesses alike."""
    return {"dataset": index.name, "classes": list(index.classes), "class_names": list(index.class_names or index.classes),
            "mean": list(index.mean), "std": list(index.std), "image_size": image_size, "crop": 0.875}  # fmt: skip


def commit() -> str:
    """The commit this code is at, with + for changes on top; empty outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (subprocess.run([*git, *words], capture_output=True, text=True, timeout=5).stdout.strip()
                         for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]))  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head + ("+" if changes else "")
