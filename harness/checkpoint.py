"""Reading and writing checkpoints. Nothing else in the project calls torch.save or torch.load.

On disk a checkpoint is complete or absent; when read it is bit-identical or refused. It holds plain
tensors and plain types only, so plain `torch.load(path, weights_only=True)` opens it.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from base.errors import CheckpointError, ResourceError, UserError, one_line
from models import build_model

SCHEMA = 1


def crash_point(name: str) -> None:
    """A place where the torture tests end the process: does nothing unless the environment names it."""
    if os.environ.get("CRASH_POINT") == name:
        os.kill(os.getpid(), 9)


def save(path: Path, payload: dict, *, retries: int = 3) -> None:
    """Write `payload` and the schema to `path`; the file that was there becomes prev_<name>.

    The new file is written beside the target, flushed, fsynced and read back before the old one
    moves, so a kill or a full disk at any instant leaves a whole checkpoint. Raises ResourceError.
    """
    _save(Path(path), {"schema": SCHEMA, **payload}, retries)


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write nothing but `weights`, for others' `model.load_state_dict(torch.load(path))`; as safely as `save`."""
    _save(Path(path), weights, retries=3)


def _save(path: Path, content: dict, retries: int) -> None:
    partial = path.with_name(path.name + ".partial")
    for attempt in range(1, retries + 1):
        try:
            _write_and_prove(partial, content)
            _move_into_place(partial, path)
            return
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if attempt == retries or not _is_io_error(error):
                raise _write_failed(path, error) from error
            time.sleep(0.2 * 4**attempt)


def _write_and_prove(partial: Path, content: dict) -> None:
    crash_point("before_open")
    with open(partial, "wb") as file:
        crash_point("after_open")
        torch.save(_on_cpu(content), file)
        crash_point("before_flush")
        file.flush()
        os.fsync(file.fileno())
    crash_point("after_fsync")
    damage = find_damage(partial)
    if damage:
        raise OSError(errno.EIO, f"the file did not read back: {damage}")


def _on_cpu(value):
    """The same with tensors that any machine can open: torch notes the device that each was saved from."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _move_into_place(partial: Path, path: Path) -> None:
    crash_point("before_rename")
    # A damaged file never replaces a sound older one, which may be the one this run came from.
    if path.exists() and not find_damage(path):
        _keep_as(path, previous(path))
    crash_point("between_renames")
    os.replace(partial, path)
    partial.unlink(missing_ok=True)  # renaming one name of a file to another of its names does nothing
    crash_point("after_rename")
    sync_directory(path.parent)


def _keep_as(path: Path, older: Path) -> None:
    """Let `older` name what `path` names, without a moment in which `path` is missing where links exist."""
    second_name = older.with_name(older.name + ".partial")
    try:
        second_name.unlink(missing_ok=True)
        os.link(path, second_name)
    except OSError:  # a filesystem without hard links
        os.replace(path, older)
        return
    try:
        os.replace(second_name, older)
    finally:
        second_name.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give the whole checkpoint `source` a second name; the file that was there becomes prev_<name>."""
    partial = target.with_name(target.name + ".partial")
    try:
        _name_or_copy(source, partial)
        crash_point("between_link_and_rename")
        _move_into_place(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _write_failed(target, error) from error


def _name_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a filesystem without hard links
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def previous(path: Path) -> Path:
    return path.with_name("prev_" + path.name)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_io_error(error: Exception) -> bool:
    # torch reports a failed write as a RuntimeError of its zip writer.
    return (
        isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )


def _write_failed(path: Path, error: Exception) -> Exception:
    if not _is_io_error(error):
        return error
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free there"
    except OSError:
        free = "its directory cannot be read"
    number = getattr(error, "errno", None) or getattr(
        error.__context__, "errno", None
    )  # torch wraps the OSError
    reason = os.strerror(number) if number else "the write failed"
    return ResourceError(
        f"cannot write {path}: {reason} ({free}); the checkpoints written before are untouched",
        "free some space, or go on elsewhere: --resume PATH --save-dir NEW",
    )


def find_damage(path: Path, only: str = "") -> str:
    """Why `path` is not a whole checkpoint file, or '': torch alone would load flipped bits.

    torch stores every entry as it is, so entries that are packed, or larger together than the file,
    are refused before they are unpacked: they are how a small file fills a memory.
    With `only`, no more than the entries whose name ends so are read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "it holds compressed entries, which torch never writes"
            if any(
                entry.external_attr & 0x10 for entry in entries
            ):  # torch would hand out memory it never filled
                return "it holds a directory, which torch never writes"
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                return "its entries are larger than the file"
            if only:
                for entry in entries:
                    if entry.filename.endswith(only):
                        archive.read(entry)
                return ""
            broken = archive.testzip()
        return f"checksum of {broken} is wrong" if broken else ""
    except zipfile.BadZipFile as error:
        return "it is empty" if path.stat().st_size == 0 else f"not a whole file ({error})"
    except (OSError, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        return str(error) or type(error).__name__
    except Exception as error:  # zlib.error, struct.error ...: whatever a damaged file provokes
        return f"{type(error).__name__}: {error}"


def read(path: str | os.PathLike, *, values_only: bool = False) -> dict:
    """Any file of tensors and plain types (ours, torchvision's, the earlier code's), on the CPU.

    With `values_only`, the bytes of tensors are neither read nor checked.
    Raises CheckpointError if it is missing, damaged, or holds anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", _what_is_there(path))
    with path.open("rb") as file:
        is_legacy = file.read(2) == b"\x80\x02"  # torch.save before 1.6, still served by torchvision
    damage = "" if is_legacy else find_damage(path, "data.pkl" if values_only else "")
    if damage:
        raise CheckpointError(f"damaged or incomplete checkpoint {path}: {damage}", _what_is_there(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=values_only and not is_legacy)
    except pickle.UnpicklingError as error:
        found = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), ""
        )
        raise CheckpointError(
            f"refused {path}: it contains code, not only tensors ({found[:160]})",
            "use a file of plain tensors from a source you trust",
        ) from None
    except Exception as error:  # torch raises many kinds for a malformed archive
        raise CheckpointError(
            f"unreadable checkpoint {path}: {type(error).__name__}", _what_is_there(path)
        ) from error


def load(path: str | os.PathLike, *, values_only: bool = False) -> dict:
    """A checkpoint of ours, whole, of a schema this code knows, as `schemas` checked it. Raises CheckpointError."""
    from base import schemas

    payload = read(path, values_only=values_only)
    schema = dict.get(payload, "schema") if isinstance(payload, dict) else None
    if type(schema) is not int:
        raise CheckpointError(
            f"{path} holds weights only, not the state of a run",
            "use --init-from to start a new run from these weights",
        )
    if schema > SCHEMA:
        unknown = ", ".join(sorted(map(str, dict.keys(payload) - schemas.Checkpoint.__annotations__.keys())))
        raise CheckpointError(
            f"{path} has schema {schema}; this code knows up to {SCHEMA}"
            + (f" and nothing of {one_line(unknown)[:200]}" if unknown else ""),
            "update this repository",
        )
    return schemas.check_checkpoint(payload, Path(path))


def _what_is_there(path: Path) -> str:
    siblings = sorted(p.name for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
    others = ", ".join(name for name in siblings if name != path.name)
    return f"in {path.parent} there is: {others}" if others else "leave --resume out to start a new run"


def newest(
    directory: Path, own: Callable[[Path, dict], bool] = lambda path, payload: True
) -> tuple[Path | None, dict | None, list[str]]:
    """The newest sound last_* (or prev_last_*, or best_*) in `directory`, its payload, and what was passed over and why.

    own(path, payload): whether it is of the run that is looked for
    Only the one that is taken is read whole. Raises CheckpointError if there are checkpoints but none is
    sound: starting again over them would destroy what may still be rescued.
    """
    candidates, passed_over = [], []
    for path in directory.glob("*.pt"):
        try:
            known = load(path, values_only=True)
            if own(path, known):
                candidates.append(
                    ((known["step"], len(known["rows"]), path.name.startswith("last_"), path.name), path)
                )
        except CheckpointError as error:
            passed_over.append(error.what)
    for _, path in sorted(candidates, reverse=True):
        try:
            return path, load(path), passed_over
        except CheckpointError as error:
            passed_over.append(error.what)
    if passed_over:
        raise CheckpointError(
            f"no sound checkpoint in {directory}: {'; '.join(passed_over)}",
            "restore a copy, or name another --save-dir to start anew",
        )
    return None, None, []


def load_model(path: str | os.PathLike, weights: str = "ema") -> tuple[nn.Module, dict]:
    """Rebuild the model of a checkpoint, in eval mode, and return it with the whole payload.

    weights: 'ema' (the raw weights where the run kept no average) or 'raw'.
    payload["eval"] says how to feed it: classes, class_names, mean, std, image_size, crop.
    """
    from base import schemas

    payload = load(path)
    try:
        model = build_model(**payload["model_args"])
    except (UserError, RuntimeError, ValueError, TypeError) as error:
        reason = one_line(str(error).splitlines()[0])
        raise CheckpointError(
            f"{path} does not hold the model it describes: {reason}", "use a checkpoint that train.py wrote"
        ) from error
    own, averaged = model.state_dict(), payload["ema"].get("shadow")
    for name, state in (("model", payload["model"]), ("ema.shadow", averaged)):
        if state is not None:
            schemas.check_tensors(state, own, f"{path}: {name}")
    model.load_state_dict(averaged if averaged is not None and weights == "ema" else payload["model"])
    return model.eval(), payload
