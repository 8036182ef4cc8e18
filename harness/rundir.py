"""One run, one directory: its files, its lock, and which checkpoint it goes on from."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from base import process
from base.errors import CheckpointError, ResourceError, UsageError
from base.flags import FREE_ON_RESUME, dashed, from_file, make_config, plain, train_defaults, train_parser

KINDS = ("last", "best", "prev_last", "prev_best")
FILES = (
    "wandb_id",
    "metrics.jsonl",
    "config.json",
    "env.json",
)  # the last two say whose the others are: they go last
PICTURES = (
    "curves",
    "lr",
    "batch",
    "gradcam",
    "gradcam_misclassified",
    "misclassified",
    "kernels",
    "filtered",
    "feature_maps",
    "stride_padding",
    "loss_landscape",
)  # what our commands draw into plots/
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
DATA_FLAGS = ("data_dir", "dataset", "split", "class_list", "allow_class_mismatch", "subset", "subset_size")


@dataclass(frozen=True)
class Held:
    """What a save directory holds of a run, as it was looked at."""

    path: Path
    run: str  # the id of the run; empty for none, and for one from before runs had ids
    parent: str  # the run it was forked from
    files: tuple[Path, ...]  # what --overwrite deletes, in this order
    checkpoints: tuple[Path, ...]  # where no run is recorded: any that are named like a run's
    state: tuple  # changes when a run writes here

    def __bool__(self) -> bool:
        return bool(self.files or self.checkpoints)


def look(save_dir: str) -> Held:
    """What lies in `save_dir`; writes nothing. Raises UsageError or ResourceError for what can be no run's directory."""
    path = Path(save_dir)
    if not save_dir or "\0" in save_dir or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UsageError(
            f"--save-dir {save_dir!r} is no directory", "name one, such as --save-dir ./checkpoints"
        )
    try:
        kind = (path / ".lock").lstat().st_mode
        if not stat.S_ISREG(kind):
            raise ResourceError(
                f"{path / '.lock'} is not a plain file", "remove it, or name another --save-dir"
            )
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unusable(path, error) from None
    config, env = _read_json(path / "config.json"), _read_json(path / "env.json")
    recorded = [
        name
        for name, known in (
            ("config.json", {"arch", "resize_schedule"} <= config.keys()),
            ("env.json", {"torch", "command"} <= env.keys()),
        )
        if known
    ]
    checkpoints = [p for kind in KINDS for p in sorted(path.glob(f"{kind}_*.pt"))]
    files = []
    if recorded:
        name = env.get("checkpoint") or _name_before_ids(checkpoints, str(config.get("arch")))
        checkpoints = [p for p in checkpoints if p.name in names(name)]
        files = [path / "plots" / f"{picture}.png" for picture in PICTURES]
        files += sorted((path / "tensorboard").glob("events.out.tfevents.*"))
        files += checkpoints + [path / f"{n}.partial" for n in names(name)]
        files += [path / n for n in FILES if n in recorded or not n.endswith(".json")]
    files = [p for p in files if p.is_file() or p.is_symlink()]
    return Held(
        path,
        _text(env, "run"),
        _text(env, "parent"),
        tuple(files),
        tuple(checkpoints),
        tuple(
            sorted(
                (p.name, s.st_ino, s.st_size, s.st_mtime_ns)
                for p in (*checkpoints, *(path / n for n in FILES))
                if (s := _stat(p))
            )
        ),
    )


def checkpoint_name(arch: str, dataset: str) -> str:
    """What follows last_ and best_."""
    return f"{arch}_{dataset}.pt"


def names(checkpoint: object) -> list[str]:
    """The four names of a run's checkpoints; none for what is no file name."""
    fits = isinstance(checkpoint, str) and checkpoint == Path(checkpoint).name and checkpoint.endswith(".pt")
    return [f"{kind}_{checkpoint}" for kind in KINDS] if fits else []


def _name_before_ids(checkpoints: list[Path], arch: str) -> str:
    """env.json did not say it then: the name of the youngest last_* of the recorded architecture."""
    found = [p for p in checkpoints if p.name.startswith(f"last_{arch}_") and _stat(p)]
    return max(found, key=lambda p: p.stat().st_mtime_ns).name.removeprefix("last_") if found else ""


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(values: dict, key: str) -> str:
    return value if isinstance(value := values.get(key), str) else ""


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _unusable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"cannot write to --save-dir {path}: {error.strerror}", "name a writable directory")


def check(held: Held, *, resuming: bool, overwrite: bool) -> None:
    """What can be said about a save directory before anything is built; writes nothing.

    Raises UsageError where it holds a run that is neither resumed nor overwritten, or one under way;
    ResourceError where it cannot be written.
    """
    there = next(p for p in (held.path, *held.path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "it is read-only" if there.is_dir() else f"{there} is a file"
        raise ResourceError(f"cannot write to --save-dir {held.path}: {what}", "name a writable directory")
    if held and not (resuming or overwrite):
        raise UsageError(
            f"{held.path} already holds a run ({(held.checkpoints or held.files)[0].name})",
            "go on with --resume auto, start anew with --overwrite, or name another --save-dir",
        )
    if (held.path / ".lock").exists():
        Lock(held.path).release()


class Identity(NamedTuple):
    """Which run goes on, or begins."""

    run: str
    parent: str = ""  # the run it was forked from
    begins: bool = True  # in this directory: as a new run or as a fork


def identity(held: Held, resume: str, saved: dict | None) -> Identity:
    """Raises UsageError where the directory holds another run than the checkpoint `saved`."""
    if not saved:  # a run that was killed before its first checkpoint keeps its id
        return Identity((held.run if resume else "") or secrets.token_hex(8))
    own, at_home = _text(saved, "run"), lies_in(resume, held.path)
    if (held.run == own) if held.run and own else at_home:
        return Identity(held.run or own or secrets.token_hex(8), held.parent, begins=False)
    if held:
        raise UsageError(
            f"{held.path} holds {_called(held.run)}, {resume} is of {_called(own)}",
            "name an empty --save-dir, or go on with what this one holds: --resume auto",
        )
    return Identity(secrets.token_hex(8), own)


def _called(run: str) -> str:
    return f"run {run}" if run else "a run without an id"


def lies_in(resume: str, path: Path) -> bool:
    """Whether the checkpoint that --resume names is one of `path`'s."""
    return resume == "auto" or (path.is_dir() and Path(resume).parent.samefile(path))


def check_foreign(held: Held, checkpoint: str) -> None:
    """Raises UsageError where a run that begins here would write over files that no run recorded here has written."""
    wanted = [held.path / name for name in (*FILES, *names(checkpoint))]
    foreign = [p.name for p in wanted if _stat(p) and p not in held.files]
    if foreign:
        raise UsageError(
            f"{held.path} holds {', '.join(foreign)}, which no run recorded there has written",
            "move them away, or name another --save-dir",
        )


def claim(held: Held, *, overwrite: bool, checkpoint: str = "") -> Lock:
    """Make the directory this run's own, prove that files can be written and renamed there, sweep up.

    checkpoint: the name of the run's checkpoints after last_ and best_.
    Raises ResourceError where it cannot be written, UsageError where another run holds it, or wrote
    to it since it was looked at.
    """
    path = held.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        try:
            if look(str(path)).state != held.state:
                raise UsageError(
                    f"{path} was changed by another run while this one started",
                    "look at what it holds, then start again",
                )
            lock.sign()
            _probe(path)
            for file in held.files if overwrite else ():
                file.unlink(missing_ok=True)
            for name in (*names(checkpoint), "config", "env", "metrics"):
                (path / f"{name}.partial").unlink(missing_ok=True)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise _unusable(path, error) from None
    return lock


def _probe(path: Path) -> None:
    file = path / f".probe-{secrets.token_hex(8)}"
    renamed = file.with_name(f"{file.name}-renamed")
    try:
        with open(file, "wb") as probe:
            probe.write(b"probe")
            os.fsync(probe.fileno())
        os.replace(file, renamed)
    finally:
        file.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)


@contextmanager
def vanishing_named(path: Path) -> Iterator[None]:
    """A directory that is removed while its run lives ends the run with one message, whatever was being written."""
    try:
        yield
    except (OSError, ResourceError, RuntimeError) as error:
        if path.is_dir():
            raise
        raise ResourceError(
            f"{path} was removed, or its disk taken away, while the run was writing to it",
            "bring it back and go on with --resume auto, or start again",
        ) from error


class Lock:
    """Held while a run lives in a directory; the kernel drops it when the process dies, however it dies."""

    def __init__(self, directory: Path):
        from filelock import FileLock, Timeout

        # It opens the file without following a link; a lock file instead of a lock would outlive a killed run.
        self.file = directory / ".lock"
        self.lock = FileLock(self.file, blocking=False, fallback_to_soft=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise UsageError(
                f"{directory} is in use by {self._holder()}", "wait for it, or name another --save-dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            # A cluster filesystem mounted without locks: better a run without one than no run.

    def sign(self) -> None:
        """Say who holds it, for the message that a second run gets."""
        flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with (
            suppress(OSError),
            open(os.open(self.file, flags), "w") as file,
        ):  # Windows locks it against this, too
            file.write(f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}")

    def _holder(self) -> str:
        with suppress(OSError):
            return self.file.read_text(encoding="utf-8", errors="replace")[:80].strip() or "another process"
        return "another process"

    def release(self) -> None:
        self.lock.release()


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


def find_resume(resume: str, held: Held, say=print) -> dict | None:
    """The payload of the checkpoint that --resume names; None where `auto` finds no checkpoint of the run.

    `auto` takes the newest sound checkpoint and says which it passed over; a PATH is taken or refused.
    """
    if not resume:
        return None
    from harness import checkpoint

    if resume != "auto":
        return checkpoint.load(resume)

    def own(path: Path, payload: dict) -> bool:
        run = _text(payload, "run")
        ours = not held.run or (run == held.run if run else path in held.checkpoints)
        say("" if ours else f"passed over {path}: of another run")
        return ours

    path, payload, passed_over = checkpoint.newest(held.path, own) if held.path.is_dir() else (None, None, [])
    for reason in passed_over:
        say(f"passed over {reason}")
    if path:
        say(f"resuming from {path}")
    return payload


def carry_best(saved: dict, resume: str, target: Path, run: str) -> str:
    """Let a run that goes on in another directory keep its best checkpoint; a note where it is not to be had."""
    from harness import checkpoint

    best, source = saved["best"], Path(resume).parent / target.name
    if not best["epoch"] or target.exists():
        return ""
    with suppress(CheckpointError):
        found = checkpoint.load(source)
        alike = all(found["best"].get(name) == best[name] for name in ("score", "epoch"))
        if alike and found.get("run") == saved.get("run"):
            checkpoint.save(target, {**found, "run": run})
            return ""
    return f"note: the best checkpoint so far, of epoch {best['epoch']}, is not beside {resume}: a better one is yet to come"


def resumed_config(config, typed: frozenset[str], saved: dict):
    """The checkpoint's flags with the typed ones laid over; refuses typed ones that change training.

    Raises CheckpointError listing every such flag that --allow-change does not name.
    """
    given = plain(config)
    allowed = {name.strip().lstrip("-").replace("-", "_") for name in config.allow_change}
    unknown = allowed - given.keys() - {"data"}
    if unknown:
        raise UsageError(
            f"--allow-change: no flag {', '.join(sorted(unknown))}", "name flags as in --help, or 'data'"
        )
    saved = check_saved(saved)
    changed = [
        name
        for name in sorted(typed)
        if name not in FREE_ON_RESUME and given[name] != saved[name] and name not in allowed
    ]
    if changed:
        listed = "; ".join(
            f"{dashed(name)} was {_shown(saved[name])}, now {_shown(given[name])}" for name in changed
        )
        raise CheckpointError(
            f"these flags would change the resumed run: {listed}",
            f"leave them out, or accept the change with --allow-change {','.join(changed)}",
        )
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
    if unknown := sorted(
        str(name)[:80] for name in saved if name not in {action.dest for action in parser._actions}
    ):
        raise CheckpointError(
            f"the checkpoint has flags that this version does not know: {', '.join(unknown)}",
            "update this repository",
        )
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
    raise CheckpointError(
        f"the data is not what this run was trained on: {', '.join(changes)}",
        "name the same data, or accept the change with --allow-change data",
    )


def check_precision(saved: str, now: str, allowed: tuple[str, ...]) -> None:
    if saved != now and "amp" not in allowed:
        raise CheckpointError(
            f"the run was trained in {saved}, here it would go on in {now}",
            "set --amp as it was, or accept the change with --allow-change amp",
        )


def check_model_args(saved: dict, now: dict) -> None:
    """Raises CheckpointError where the checkpoint's model is another one."""
    names = ("arch", "num_classes", "use_blurpool", "head", "stem")
    if any(saved.get(name) != now[name] for name in names):
        words = [", ".join(f"{name} {args.get(name)}" for name in names) for args in (saved, now)]
        raise CheckpointError(
            f"checkpoint: {words[0]}; now: {words[1]}",
            "start a new run from its weights with --init-from and --reset-head",
        )


def eval_facts(index, image_size: int) -> dict:
    """What a checkpoint says about feeding its model, so that every tool preprocesses alike."""
    return {
        "dataset": index.name,
        "classes": list(index.classes),
        "class_names": list(index.class_names or index.classes),
        "mean": list(index.mean),
        "std": list(index.std),
        "image_size": image_size,
        "crop": 0.875,
    }


def commit() -> str:
    """The commit this code is at, with + for changes on top; empty outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=5).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head + ("+" if changes else "")


def restore(built, saved: dict, config) -> None:
    """Take over a checkpoint's state; refuse one that this run cannot go on from."""
    import optim

    check_precision(saved["precision"], built.runtime.precision, config.allow_change)
    process.say(check_fingerprint(saved["fingerprint"], built.metadata["fingerprint"], config.allow_change))
    same_plan = saved["total_steps"] == built.metadata["total_steps"]
    check_model_args(saved["model_args"], built.metadata["model_args"])
    if not same_plan:
        saved = saved | {"schedule": saved["schedule"] | {"position": 0}}
    flags_then = saved["config"]
    if not optim.keeps_alike(
        config.optimizer, config.momentum, flags_then.get("optimizer"), flags_then.get("momentum")
    ):
        process.say("note: another optimizer than the checkpoint's: it starts without its state")
        saved = saved | {"optimizer": saved["optimizer"] | {"state": {}}}
    built.state.load_state_dict(saved)
    if same_plan:
        check_position(built)
    else:
        replan(built)
    if built.runtime.any_rank(built.state.step) != built.state.step:
        raise CheckpointError(
            "the ranks found different checkpoints", "let all of them see the same --save-dir"
        )


def check_position(built) -> None:
    """Raises CheckpointError where the resumed step does not lie in the epoch after the last row."""
    from train_utils import phase_of

    state, epoch, epochs = built.state, len(built.state.rows) + 1, built.epochs
    phase = phase_of(built.phases, min(epoch, epochs))
    first = phase.step_before(epoch)
    last = first + phase.steps_per_epoch if epoch <= epochs else first
    if epoch > epochs + 1 or not first <= state.step <= last or state.step != state.schedule.position:
        raise CheckpointError(
            f"the checkpoint has {len(state.rows)} finished epochs and step {state.step} "
            f"({state.schedule.position} of its schedule): no place in this run",
            "use a checkpoint that train.py wrote",
        )


def replan(run) -> None:
    """After an allowed change of the plan: finished epochs count, the rest follows the new one."""
    from train_utils import phase_of

    epoch = len(run.state.rows) + 1
    run.state.step = sum(phase.steps for phase in run.phases)
    if epoch <= run.epochs:
        run.state.step = phase_of(run.phases, epoch).step_before(epoch)
    run.state.start_epoch()
    run.state.schedule.seek(run.state.step)
