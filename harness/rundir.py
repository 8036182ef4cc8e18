"""A run's directory: what it holds, which run may write there, and everything about resuming.

A start of train.py calls, in this order: `scan`, `find_checkpoint`, `resumed_config`, `check`, `check_ranks`,
`identify`, `restore`, `acquire` and `copy_best`. Nothing before `acquire` writes to the directory.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from base.config_file import from_file
from base.errors import CheckpointError, ResourceError, UsageError, did_you_mean, doing, nearest_path
from base.files import NO_LOCKS, replacing
from base.flags import (
    DATASET,
    FREE_ON_RESUME,
    dashed,
    defaults,
    make_config,
    plain,
    train_parser,
    with_short_warmup,
)
from base.parser import parse_augment
from base.process import say

if TYPE_CHECKING:
    from filelock import FileLock

    from sources.index import DatasetIndex

KINDS = ("last", "best", "prev_last", "prev_best")  # of checkpoints
# The last two identify the run, so they are deleted last.
FILES = ("wandb_id", "trackio_id", "metrics.jsonl", "steps.jsonl", "config.json", "env.json")
OLD_PARTIALS = ("config", "env", "metrics")  # earlier versions wrote config.partial, not config.json.partial
EVAL_CROPS = "eval_crops"  # the folder of --cache-eval
PLOTS = ("curves", "steps", "lr", "batch", "gradcam", "gradcam_misclassified", "misclassified", "kernels",
         "filtered", "feature_maps", "stride_padding", "loss_landscape")  # fmt: skip
# Flags about a single start of a run: never taken from a checkpoint.
START_FLAGS = {"resume", "overwrite", "allow_change", "save_dir", "stop_after", "dry_run", "summary", "debug",
               "config"}  # fmt: skip
# Values of flags that old checkpoints lack, where the default is another one now.
OLD_VALUES = {"eval_crop": 0.875}
# These decide which step belongs to which epoch.
PLAN_FLAGS = ("epochs", "batch_size", "resize_schedule", "phase_epochs", "phase_batch_sizes")
# These decide the weights' shapes.
MODEL_ARGS = ("arch", "num_classes", "use_blurpool", "head", "stem", "width")


@dataclass(frozen=True)
class SaveDir:
    """What a directory held when it was scanned; falsy if there was nothing of a run.

    A run is recorded in a directory if its config.json or env.json is there.
    """

    path: Path
    run_id: str  # of the recorded run; empty without one, or if it is from before runs had ids
    parent: str  # id of the run that the recorded run was forked from, or empty
    files: tuple[Path, ...]  # of the recorded run: what --overwrite deletes, in this order
    checkpoints: tuple[Path, ...]  # of the recorded run; without one, all that are named like a run's
    signature: tuple  # changes when a run writes here
    flags: dict  # of the recorded run, from its config.json; empty without one

    def __bool__(self) -> bool:
        return bool(self.files or self.checkpoints)


def scan(save_dir: str) -> SaveDir:
    """Return what `save_dir` holds.

    Raises UsageError if it cannot be a directory's name, ResourceError if it cannot be used.
    """
    path = Path(save_dir)
    if not save_dir or "\0" in save_dir or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UsageError(f"--save-dir {save_dir!r} is not a directory name", "use one such as ./checkpoints")
    try:
        lock = _lstat(path / ".lock")
    except OSError as error:
        raise _unusable(path, error) from None
    if lock and not stat.S_ISREG(lock.st_mode):
        raise ResourceError(f"{path / '.lock'} is not a plain file", "remove it, or use another --save-dir")
    config, env = _read_json(path / "config.json"), _read_json(path / "env.json")
    has_config, has_env = {"arch", "resize_schedule"} <= config.keys(), {"torch", "command"} <= env.keys()
    checkpoints = [p for kind in KINDS for p in sorted(path.glob(f"{kind}_*.pt"))]
    files = []
    if has_config or has_env:
        names = checkpoint_files(env.get("checkpoint") or _newest_name(checkpoints, str(config.get("arch"))))
        checkpoints = [p for p in checkpoints if p.name in names]
        files = [path / "plots" / f"{plot}.png" for plot in PLOTS]
        files += sorted((path / EVAL_CROPS).glob("eval-*/*"))
        for board in (path / "tensorboard", path / "tensorboard" / "steps"):
            files += sorted(board.glob("events.out.tfevents.*"))
        files += checkpoints + [path / f"{name}.partial" for name in names]
        foreign = {"config.json": not has_config, "env.json": not has_env}
        files += [path / name for name in FILES if not foreign.get(name)]
        files = [p for p in files if p.is_file() or p.is_symlink()]
    entries = [(p.name, _lstat(p)) for p in (*checkpoints, *(path / name for name in FILES))]
    signature = tuple((name, e.st_ino, e.st_size, e.st_mtime_ns) for name, e in entries if e)
    run_id, parent = (str(env.get(key) or "") for key in ("run", "parent"))
    recorded = config if has_config else {}
    return SaveDir(path, run_id, parent, tuple(files), tuple(checkpoints), signature, recorded)


def checkpoint_name(arch: str, dataset: str) -> str:
    """Return the file name of a run's checkpoints without their kind: last_<name>, best_<name>, ..."""
    return f"{arch}_{dataset}.pt"


def checkpoint_files(name: object) -> list[str]:
    """Return the four file names of a run's checkpoints; none if `name` is not a `checkpoint_name`."""
    is_name = isinstance(name, str) and name == Path(name).name and name.endswith(".pt")
    return [f"{kind}_{name}" for kind in KINDS] if is_name else []


def _newest_name(checkpoints: list[Path], arch: str) -> str:
    """Return the `checkpoint_name` of the newest last_* of `arch`, for an old env.json that lacks it."""
    found = [p for p in checkpoints if p.name.startswith(f"last_{arch}_") and _lstat(p)]
    return max(found, key=lambda p: p.stat().st_mtime_ns).name.removeprefix("last_") if found else ""


def _read_json(path: Path) -> dict:
    """Return the JSON object in `path`, or {} if it holds anything else and so is not a run's.

    Not through `base.schemas`, because every start reads two such files, and pydantic takes 0.1 s to import.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_checkpoint(path: str) -> None:
    """Raise CheckpointError if there is no such file. Commands call this before they import torch."""
    if not Path(path).is_file():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        found = ", ".join(sorted(str(p) for p in folder.glob("*.pt")))
        others = f"choose one of {found}" if found else "give the path of a best_*.pt or last_*.pt"
        what = f"no checkpoint at {path}" + ", which is a directory" * Path(path).is_dir()
        raise CheckpointError(what, nearest_path(path) or others)


# Resuming: which checkpoint, with which flags, as which run


def find_checkpoint(resume: str, save_dir: SaveDir) -> dict | None:
    """Return the content of the checkpoint to resume from, or None to start a new run.

    resume: the path of a checkpoint; "auto", for the newest intact one of the run in `save_dir`, or a new
            run if there is none; or "" for a new run
    Raises CheckpointError if the one at a path, or all in the directory, are damaged.
    """
    if not resume or (resume == "auto" and not save_dir.path.is_dir()):
        return None
    if resume != "auto" and (found := ", ".join(sorted(map(str, Path(resume).glob("*.pt"))))):
        fix = f"use --resume auto --save-dir {shlex.quote(resume)}, or --resume with one of {found}"
        raise CheckpointError(f"no checkpoint at {resume}, which is a directory", fix)
    doing("loading torch and the checkpoint")
    from harness import checkpoint

    if resume != "auto":
        return checkpoint.load(resume)

    def is_own(path: Path, payload: dict) -> bool:
        run_id = payload.get("run")
        own = not save_dir.run_id or (run_id == save_dir.run_id if run_id else path in save_dir.checkpoints)
        if not own:
            say(f"skipping {path}: it belongs to another run")
        return own

    names = [f"{kind}_*.pt" for kind in KINDS]  # not weights that someone keeps there
    path, payload, skipped = checkpoint.newest(save_dir.path, is_own, names)
    for reason in skipped:
        say(f"skipping {reason}")
    if path:
        say(f"resuming from {path}")
    return payload


def resumed_config(config, typed: frozenset[str], saved: dict):
    """Return the config of a resumed run: the checkpoint's flags `saved`, overridden by those `typed`.

    Raises CheckpointError if a typed flag would change training and --allow-change does not name it.
    """
    given = plain(config)
    allowed = set(config.allow_change)
    if unknown := allowed - given.keys() - {"data"}:
        names = ", ".join(sorted(unknown))
        fix = did_you_mean(min(unknown), given) + "use names of flags in --help, or 'data'"
        raise UsageError(f"--allow-change: there is no flag {names}", fix)
    saved = parse_saved_flags(saved)
    fixed = sorted(typed - FREE_ON_RESUME - allowed)
    if changed := [name for name in fixed if given[name] != saved[name]]:
        values = [f"{dashed(name)} was {_shown(saved[name])}, now {_shown(given[name])}" for name in changed]
        fix = f"leave them out, or accept the change with --allow-change {','.join(changed)}"
        raise CheckpointError(f"these flags would change the resumed run: {'; '.join(values)}", fix)
    return _overridden(saved, config, typed)


def restarted_config(config, typed: frozenset[str], save_dir: SaveDir):
    """Return the config of a run stopped before its first checkpoint: its flags, overridden by those `typed`.

    Nothing was learned yet, so any flag may change.
    """
    try:
        saved = parse_saved_flags(save_dir.flags)
    except CheckpointError as error:
        fix = "repair its config.json, or start a new run with --overwrite instead of --resume"
        raise CheckpointError(f"no checkpoint in {save_dir.path}, and {error.what}", fix) from None
    say(f"no checkpoint in {save_dir.path} yet: its run starts again, with the flags of its config.json")
    return _overridden(saved, config, typed)


def _overridden(saved: dict, config, typed: frozenset[str]):
    """Return the config of the flags `saved`, with those `typed` in their place."""
    values = saved | {name: plain(config)[name] for name in START_FLAGS | typed}
    if any(values[name] != saved[name] for name in ("schedule", "epochs")):
        values = with_short_warmup(values, typed)
    return make_config(values)


def with_saved_data(config, typed: frozenset[str], saved: dict):
    """Return `config`, with the data flags that were not typed taken from the checkpoint's flags `saved`.

    --split and --class-list belong to the saved dataset: with another --dataset they keep their defaults.
    """
    saved = parse_saved_flags(saved)
    if "dataset" in typed and config.dataset != saved["dataset"]:
        saved |= {name: defaults()[name] for name in ("split", "class_list")}
    names = {flag.name for flag in DATASET} - typed
    return make_config(plain(config) | {name: saved[name] for name in names})


def as_trained(index: DatasetIndex, saved: dict) -> DatasetIndex:
    """Return `index` with the name, the orientation and the normalization that the run began with.

    Earlier versions called all class folders imagenet_1k, and turned no image; a folder can be renamed.
    """
    then = saved["eval"]
    mean, std = tuple(then["mean"]), tuple(then["std"])
    return replace(index, name=then["dataset"], exif=then.get("exif", False), mean=mean, std=std)


def parse_saved_flags(saved: dict) -> dict:
    """Return the flags of a checkpoint as {flag: value}, checked by the parser.

    A missing flag gets the value that the version without it used.
    Raises CheckpointError that names a flag which this version does not know or whose value it refuses.
    """
    try:
        values = defaults() | OLD_VALUES | from_file(train_parser(), saved, exact=True)
    except UsageError as error:
        fix = "use a run that train.py wrote; if its version was newer, update this code"
        raise CheckpointError(f"malformed flags of the saved run: {error.what}", fix) from None
    return plain(make_config(values))


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class RunIdentity(NamedTuple):
    """Which run is about to train."""

    id: str
    parent: str = ""  # id of the run that it was forked from, or empty
    is_new: bool = True  # to this directory: the run starts here, or is forked into it


def check_ranks(runtime, saved: dict | None) -> None:
    """Raise CheckpointError on every rank if they found different checkpoints, or if only some found one."""
    step = saved["step"] if saved else -1
    if runtime.max_over_ranks(step) != -runtime.max_over_ranks(-step):  # the largest and the smallest step
        raise CheckpointError("the ranks found different checkpoints", "give all ranks the same --save-dir")


def identify(save_dir: SaveDir, resume: str, saved: dict | None, checkpoint: str) -> RunIdentity:
    """Decide whether the run recorded in `save_dir` continues, or which new run begins there.

    saved:      the checkpoint to resume from, if any
    checkpoint: the `checkpoint_name` of the run
    Raises UsageError if `saved` belongs to another run than the recorded one, or if a new run would
    replace files that the recorded run did not write.
    """
    saved_id = (saved or {}).get("run", "")
    if saved:
        ids_known = save_dir.run_id and saved_id
        if save_dir.run_id == saved_id if ids_known else resumes_in_place(resume, save_dir.path):
            run_id = save_dir.run_id or saved_id or secrets.token_hex(8)
            return RunIdentity(run_id, save_dir.parent, is_new=False)
        if save_dir:
            ids = (save_dir.run_id, saved_id)
            recorded, other = (f"run {i}" if i else "a run without an id" for i in ids)
            fix = "use an empty --save-dir, or resume the run it holds with --resume auto"
            raise UsageError(f"{save_dir.path} holds {recorded}, but {resume} belongs to {other}", fix)
    wanted = [save_dir.path / name for name in (*FILES, *checkpoint_files(checkpoint))]
    if foreign := [p.name for p in wanted if _lstat(p) and p not in save_dir.files]:
        what = f"{save_dir.path} holds {', '.join(foreign)}, which no run recorded there wrote"
        raise UsageError(what, "move them away, or use another --save-dir")
    kept = save_dir.run_id if resume and not saved else ""  # the run was killed before its first checkpoint
    return RunIdentity(kept or secrets.token_hex(8), saved_id)


def resumes_in_place(resume: str, directory: Path) -> bool:
    """Return whether the checkpoint to resume from is in `directory`."""
    return resume == "auto" or (directory.is_dir() and Path(resume).parent.samefile(directory))


# Resuming: the state


def restore(run, saved: dict, config) -> None:
    """Load the checkpoint `saved` into `run`, a `loop.Run`.

    Raises CheckpointError if its precision, data, model or position do not fit the run; --allow-change
    accepts another precision or other data.
    """
    from optim.saved import same_state

    state, metadata, allowed = run.state, run.metadata, config.allow_change
    if saved["precision"] != run.runtime.precision and "amp" not in allowed:
        what = f"the run was trained in {saved['precision']} and would continue in {run.runtime.precision}"
        raise CheckpointError(what, "set --amp as before, or accept the change with --allow-change amp")
    _check_data(saved["fingerprint"], metadata["fingerprint"], allowed)
    _check_files(saved.get("files", {}), metadata.get("files", {}), allowed)
    then, now = saved["model_args"], metadata["model_args"]
    if changed := [
        f"{k} {then.get(k)} then, {now.get(k)} now" for k in MODEL_ARGS if then.get(k) != now.get(k)
    ]:
        fix = "leave these flags out, or start a new run in another --save-dir"
        raise CheckpointError(f"the checkpoint holds another model: {', '.join(changed)}", fix)
    planned = parse_saved_flags(saved["config"])
    same_plan = saved["total_steps"] == metadata["total_steps"]
    same_plan &= all(planned[name] == plain(config)[name] for name in PLAN_FLAGS)
    if not same_plan:  # the old position may lie outside the new schedule
        saved = saved | {"schedule": saved["schedule"] | {"position": 0}}
    if not same_state(plain(config), planned):
        say("note: the optimizer or its groups differ from the checkpoint's: its state starts empty")
        saved = saved | {"optimizer": saved["optimizer"] | {"state": {}}}
    state.load_state_dict(saved)
    if not run.runtime.is_main:
        state.epoch_sums["bad_images"] = 0  # rank 0 has those of all, see `loop.save`
    if same_plan:
        _check_position(run)
    else:
        _start_next_epoch(run)


def _check_data(saved: dict, current: dict, allowed: tuple[str, ...]) -> None:
    """Compare two `DatasetIndex.fingerprint`s. Raises CheckpointError for a change that is not `allowed`."""
    changes = []
    for part, words in (("classes", "classes"), ("train", "training images"), ("val", "validation images")):
        if saved.get(part) != current[part]:
            count = f"num_{part}"
            changes.append(f"the {words} ({saved.get(count)} then, {current[count]} now)")
    if changes and not ("data" in allowed and saved.get("num_classes") == current["num_classes"]):
        what = f"this is not the data that the run was trained on; changed: {', '.join(changes)}"
        accept = "accept the change with --allow-change data"
        if saved.get("num_classes") != current["num_classes"]:
            accept = "start a new run from its weights: --init-from CHECKPOINT --reset-head"
        raise CheckpointError(what, f"use the same data, or {accept}")
    if changes:
        say(f"note: the data changed: {', '.join(changes)}")


def files_of_flags(config) -> dict[str, str]:
    """Return the files that decide what a run learns, besides its images: {flag, perhaps numbered: path}."""
    flag, texts = ("phase_augment" if config.phase_augment else "augment"), config.phase_augment
    steps = [step for text in texts or [config.augment] for step in parse_augment(text)]
    paths = [path for name, path in steps if name == "pipeline"]
    found = {f"{flag} {k}": path for k, path in enumerate(paths, 1)}
    if config.loss == "ce" and os.path.isfile(config.class_weights):  # not a pipe, which is read once
        found["class_weights"] = config.class_weights
    return found


def _check_files(saved: dict[str, int], current: dict[str, int], allowed: tuple[str, ...]) -> None:
    """Compare checksums of `files_of_flags`. Raises CheckpointError for a change that is not `allowed`."""
    for name in saved.keys() & current.keys():
        flag = name.split()[0]
        if saved[name] != current[name] and flag not in allowed:
            what = f"the file of {dashed(flag)} has changed since the run began"
            raise CheckpointError(what, f"restore it, or accept the change with --allow-change {flag}")


def _check_position(run) -> None:
    """Raise CheckpointError unless the checkpoint's step lies in the epoch after its last row."""
    state, epoch = run.state, len(run.state.rows) + 1
    first, last = _steps_before(run.phases, epoch), _steps_before(run.phases, epoch + 1)
    if epoch > run.epochs + 1 or not first <= state.step <= last or state.step != state.schedule.position:
        position = f"step {state.step} ({state.schedule.position} of its schedule)"
        what = f"the checkpoint's {len(state.rows)} finished epochs and {position} do not fit together"
        raise CheckpointError(what, "use a checkpoint that train.py wrote")


def _start_next_epoch(run) -> None:
    """Continue a run whose plan was changed: keep its finished epochs; the rest follows the new plan."""
    run.state.step = _steps_before(run.phases, len(run.state.rows) + 1)
    run.state.start_epoch()
    run.state.schedule.seek(run.state.step)
    best, last_size = run.state.best["epoch"], run.phases[-1].image_size
    if best and not (run.may_be_best(best) and run.state.rows[best - 1]["image_size"] == last_size):
        say(f"note: epoch {best}, the best so far, does not count under the new plan")
        run.state.forget_best()


def _steps_before(phases, epoch: int) -> int:
    """Return the planned steps before `epoch`; all of them if the plan has no such epoch."""
    phase = next((phase for phase in phases if epoch <= phase.last_epoch), phases[-1])
    return phase.step_before(min(epoch, phase.last_epoch + 1))


def copy_best(saved: dict, resume: str, target: Path, run_id: str) -> None:
    """Copy the best checkpoint so far into the directory of a forked run; print a note if it is missing.

    saved:  the checkpoint at the path `resume`, from which the run was forked
    target: the path of the copy
    run_id: the id of the fork
    """
    from harness import checkpoint

    best, source = saved["best"], Path(resume).parent / target.name
    if not best["epoch"] or target.exists():
        return
    with suppress(CheckpointError):
        found = checkpoint.load(source)
        same_best = all(found["best"].get(name) == best[name] for name in ("score", "epoch"))
        if same_best and found.get("run") == saved.get("run"):
            checkpoint.save(target, found | {"run": run_id})
            return
    say(f"note: the best checkpoint (epoch {best['epoch']}) was not copied: it is not beside {resume}")


def copy_steps(saved: dict, resume: str, target: Path) -> None:
    """Copy steps.jsonl, if it lies beside the checkpoint `resume` of a run that continues elsewhere.

    saved:  the content of the checkpoint
    target: the path of the copy
    """
    source = Path(resume).parent
    same_run = saved.get("run") and _read_json(source / "env.json").get("run") == saved["run"]
    if same_run and not target.exists() and (source / target.name).is_file():
        with replacing(target, parents=False) as partial:
            shutil.copyfile(source / target.name, partial)


# Writing to the directory


def check(save_dir: SaveDir, *, resuming: bool, overwrite: bool) -> None:
    """Check that this run may use the directory, before anything is built.

    Raises UsageError if it holds a run that is neither resumed nor overwritten, or that is still running;
    ResourceError if it is not writable.
    """
    path = save_dir.path
    parent = nearest_existing(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "it is read-only" if parent.is_dir() else f"{parent} is a file"
        raise ResourceError(f"cannot write to --save-dir {path}: {reason}", "use a writable directory")
    if save_dir and not (resuming or overwrite):
        what = f"{path} already holds a run ({(save_dir.checkpoints or save_dir.files)[0].name})"
        fix = "continue it with --resume auto, replace it with --overwrite, or use another --save-dir"
        raise UsageError(what, fix)
    if (path / ".lock").exists():
        _lock(path).release()


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the closest directory above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def acquire(save_dir: SaveDir, *, overwrite: bool, checkpoint: str = "") -> FileLock:
    """Create and lock the directory, test that it is writable, and delete unfinished files.

    overwrite:  delete the former run's files as well
    checkpoint: the `checkpoint_name` of the run
    Raises ResourceError if the directory is not writable; UsageError if another run is using it, or has
    written to it since the scan.
    """
    path = save_dir.path
    partials = [f"{name}.partial" for name in (*checkpoint_files(checkpoint), *FILES, *OLD_PARTIALS)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            if scan(str(path)).signature != save_dir.signature:
                what = f"another run changed {path} while this one started"
                raise UsageError(what, "check what it contains, then start again")
            _sign(lock)
            _test_writing(path)
            for file in (*(save_dir.files if overwrite else ()), *(path / name for name in partials)):
                file.unlink(missing_ok=True)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise _unusable(path, error) from None
    return lock


def _test_writing(directory: Path) -> None:
    """Write, sync, rename and delete a file: where that fails, no checkpoint could be saved."""
    file = directory / f".probe-{secrets.token_hex(8)}"
    with replacing(file) as partial, open(partial, "wb") as probe:
        probe.write(b"probe")
        os.fsync(probe.fileno())
    file.unlink()


def _unusable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"cannot write to --save-dir {path}: {error.strerror}", "use a writable directory")


@contextmanager
def explain_removal(directory: Path) -> Iterator[None]:
    """Turn whatever error follows when the run's directory disappears into one ResourceError."""
    try:
        yield
    except (OSError, ResourceError, RuntimeError) as error:
        if directory.is_dir():
            raise
        what = f"{directory}, or the disk it is on, was removed during the run"
        raise ResourceError(what, "restore it and use --resume auto, or start again") from error


def in_use(directory: Path) -> bool:
    """Return whether a process may be training in the directory; always, on a filesystem without locks."""
    if not (directory / ".lock").exists():  # a copy of a run, say: leave it as it is
        return False
    try:
        lock = _lock(directory)
    except (UsageError, OSError):
        return True
    free = lock.is_locked
    lock.release()
    return not free


def _lock(directory: Path) -> FileLock:
    """Take the directory's lock, which the kernel releases however the process ends."""
    from filelock import FileLock, Timeout

    # FileLock follows no link. Its soft lock is only a file, which would survive a killed run.
    lock = FileLock(directory / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = Path(lock.lock_file).read_text(encoding="utf-8", errors="replace")[:80].strip()
        what = f"{directory} is in use by {holder or 'another process'}"
        raise UsageError(what, "wait for it, or use another --save-dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        # On a cluster filesystem without locks, train without one.
    return lock


def _sign(lock: FileLock) -> None:
    """Write who holds the lock into it, for the error of a second run."""
    flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    with suppress(OSError), open(os.open(lock.lock_file, flags), "w") as file:
        file.write(f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}")
