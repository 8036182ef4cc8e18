"""Writing and reading checkpoints. Nothing else in the project calls torch.save or torch.load.

A checkpoint on disk is complete or absent. Reading returns exactly what was saved, or refuses the file.
It holds plain tensors and plain types only, so `torch.load(path, weights_only=True)` opens it.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from base.errors import CheckpointError, ResourceError, UserError, nearest_path, one_line
from models import build_model

SCHEMA = 1  # version of the format
ATTEMPTS = 3  # at writing, in case the disk recovers


def save(path: Path, payload: dict) -> None:
    """Write `payload` and the schema to `path`, see `write`."""
    write(path, {"schema": SCHEMA, **payload})


def write(path: Path, content: dict) -> None:
    """Write a checkpoint or a bare state dict to `path`; a file that was there becomes prev_<name>.

    The new file is written beside the target, flushed, fsynced and read back before the old one moves,
    so a kill or a full disk at any moment leaves a complete checkpoint. Raises ResourceError.
    """
    partial = path.with_name(path.name + ".partial")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _write_and_prove(partial, content)
            _move_into_place(partial, path)
            return
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if not _is_io_error(error):
                raise
            if attempt == ATTEMPTS:
                raise _write_failed(path, error) from error
            time.sleep(0.2 * 4**attempt)


def _write_and_prove(partial: Path, content: dict) -> None:
    with open(partial, "wb") as file:
        torch.save(_on_cpu(content), file)
        file.flush()
        os.fsync(file.fileno())
    if damage := find_damage(partial):
        raise OSError(errno.EIO, f"reading the file back failed: {damage}")


def _on_cpu(value):
    """Return `value` with its tensors on the CPU, each in memory of its own.

    Plain torch.load needs a GPU to open a tensor saved on a GPU, and reads the whole buffer of a view.
    """
    if isinstance(value, torch.Tensor):
        is_view = value.untyped_storage().nbytes() > value.nbytes
        return value.detach().clone().cpu() if is_view else value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _move_into_place(partial: Path, path: Path) -> None:
    # A damaged file must not replace an intact prev_*: the run may have been resumed from that one.
    if path.exists() and not find_damage(path):
        _keep_as(path, path.with_name("prev_" + path.name))
    os.replace(partial, path)
    partial.unlink(missing_ok=True)  # os.replace does nothing if both names are the same file
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot sync directories
            raise
    finally:
        os.close(descriptor)


def _keep_as(path: Path, older: Path) -> None:
    """Make `older` a name of the file `path`. Where hard links exist, `path` is never missing."""
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
    """Make `target` a second name of the checkpoint `source`; a file that was there becomes prev_<name>.

    Copies the file where there are no hard links. Raises ResourceError.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        _second_name(source, partial)
        _move_into_place(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _write_failed(target, error) from error


def _second_name(source: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(source, name)
    except OSError:  # a filesystem without hard links
        shutil.copyfile(source, name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())


def _is_io_error(error: Exception) -> bool:
    # torch's zip writer raises a RuntimeError if a write fails.
    writer = ("PytorchStreamWriter", "inline_container")
    return isinstance(error, OSError) or any(name in str(error) for name in writer)


def _write_failed(path: Path, error: Exception) -> ResourceError:
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free there"
    except OSError:
        free = "its directory cannot be read"
    # torch wraps the OSError of a failed write.
    number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
    reason = os.strerror(number) if number else "the write failed"
    what = f"cannot write {path}: {reason} ({free}); earlier checkpoints are intact"
    return ResourceError(what, "free some space, or continue elsewhere: --resume PATH --save-dir NEW")


def find_damage(path: Path, only: str = "") -> str:
    """Return why `path` is not a complete checkpoint file, or ''.

    torch.load checks no CRCs, so it would load flipped bits. torch never compresses entries: a compressed
    one, or entries that together exceed the file, are refused before anything is read, because with them a
    small file could fill the memory.
    only: read and check only the entries whose names end with this
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "it holds compressed entries, which torch never writes"
            if any(entry.external_attr & 0x10 for entry in entries):
                return "it holds a directory, for which torch would return uninitialized memory"
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                return "its entries are larger than the file"
            for entry in entries:
                if entry.filename.endswith(only):
                    archive.read(entry)  # and check its CRC-32
        return ""
    except zipfile.BadZipFile as error:
        return "it is empty" if path.stat().st_size == 0 else f"not a complete file ({error})"
    except Exception as error:  # a damaged file can raise anything: OSError, zlib.error, struct.error
        return f"{type(error).__name__}: {error}"


def read(path: str | os.PathLike, *, values_only: bool = False) -> dict:
    """Load any file of tensors and plain types (ours, torchvision's, timm's) onto the CPU.

    values_only: do not read or check the tensors' bytes
    Raises CheckpointError if the file is missing, damaged, or holds anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        what = f"no checkpoint at {path}" + ", which is a directory" * path.is_dir()
        raise CheckpointError(what, nearest_path(path) or _alternatives(path))
    with path.open("rb") as file:
        is_legacy = file.read(2) == b"\x80\x02"  # torch.save before 1.6, still served by torchvision
    damage = "" if is_legacy else find_damage(path, "data.pkl" if values_only else "")
    if damage:
        raise CheckpointError(f"damaged or incomplete checkpoint {path}: {damage}", _alternatives(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=values_only and not is_legacy)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
        what = f"refused {path}: it contains code, not only tensors ({''.join(lines[:1])[:160]})"
        raise CheckpointError(what, "use a file of plain tensors from a source you trust") from None
    except Exception as error:  # torch raises many kinds for a malformed archive
        what = f"unreadable checkpoint {path}: {type(error).__name__}"
        raise CheckpointError(what, _alternatives(path)) from error


def _alternatives(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob("*.pt") if p != path) if path.parent.is_dir() else []
    others = f"use another file in {path.parent}: {', '.join(found)}"
    return others if found else "use another file, or train a new run"


def load(path: str | os.PathLike, *, values_only: bool = False) -> dict:
    """Load the checkpoint of a run and check it against its schema. Raises CheckpointError.

    values_only: as in `read`
    """
    from base import schemas

    payload = read(path, values_only=values_only)
    schema = dict.get(payload, "schema") if isinstance(payload, dict) else None
    if type(schema) is not int:
        what = f"{path} holds weights only, not the state of a run"
        raise CheckpointError(what, "use --init-from to start a new run from these weights")
    if schema > SCHEMA:
        unknown = ", ".join(sorted(map(str, dict.keys(payload) - schemas.Checkpoint.__annotations__.keys())))
        fields = f" and has unknown fields: {one_line(unknown)[:200]}" if unknown else ""
        what = f"{path} has schema {schema}{fields}; this code reads up to {SCHEMA}"
        raise CheckpointError(what, "update this repository")
    return schemas.check_checkpoint(payload, Path(path))


def newest(
    directory: Path,
    is_own: Callable[[Path, dict], bool] = lambda path, payload: True,
    names: Sequence[str] = ("*.pt",),
) -> tuple[Path | None, dict | None, list[str]]:
    """Return path and content of the newest intact checkpoint in `directory`, and why others were skipped.

    The newest is a last_*, even if others have more steps: the run was resumed from an earlier checkpoint,
    and they are of the branch that it left. If no last_* is intact, it is the one with the most steps.

    is_own: called with the path and the content of a checkpoint; False excludes it
    names: the patterns of the files to look at
    Returns (None, None, []) if there is none. Raises CheckpointError if all are damaged: a new run there
    would overwrite what may still be rescued. Only the chosen file is read completely.
    """
    candidates, skipped = [], []
    for path in (path for name in names for path in directory.glob(name)):
        try:
            values = load(path, values_only=True)
            if is_own(path, values):
                age = (path.name.startswith("last_"), values["step"], len(values["rows"]), path.name)
                candidates.append((age, path))
        except CheckpointError as error:
            skipped.append(error.what)
    for _, path in sorted(candidates, reverse=True):
        try:
            return path, load(path), skipped
        except CheckpointError as error:
            skipped.append(error.what)
    if skipped:
        what = f"no intact checkpoint in {directory}: {'; '.join(skipped)}"
        raise CheckpointError(what, "restore a copy, or start a new run in another --save-dir")
    return None, None, []


def eval_settings(index, image_size: int, crop: float, flip: bool) -> dict:
    """Return payload["eval"]: the classes, and how every tool prepares and scores images.

    "exif" is there only if it is true: earlier versions ignored the orientation of all images.
    """
    return ({"exif": True} if index.exif else {}) | {
        "dataset": index.name,
        "classes": list(index.classes),
        "class_names": list(index.class_names or index.classes),
        "mean": list(index.mean),
        "std": list(index.std),
        "image_size": image_size,
        "crop": crop,
        "flip": flip,
    }


def load_model(path: str | os.PathLike, weights: str = "ema") -> tuple[nn.Module, dict]:
    """Rebuild the model of a checkpoint, on the CPU in eval mode; return it and the whole checkpoint.

    weights: "ema" (the raw weights if the run kept no average) or "raw"
    Raises CheckpointError.
    """
    from base import schemas

    payload = load(path)
    try:
        with torch.device("meta"):  # of which no memory is taken: the file may describe a network of any size
            own = build_model(**payload["model_args"]).state_dict()
    except (UserError, RuntimeError, ValueError, TypeError) as error:
        reason = one_line(str(error).splitlines()[0])
        what = f"{path} describes a model that cannot be built: {reason}"
        raise CheckpointError(what, "use a checkpoint that train.py wrote") from error
    averaged = payload["ema"].get("shadow")
    schemas.check_tensors(payload["model"], own, f"{path}: model")
    if averaged is not None:
        schemas.check_tensors(averaged, own, f"{path}: ema.shadow")
    model = build_model(**payload["model_args"])
    model.load_state_dict(averaged if averaged is not None and weights == "ema" else payload["model"])
    return model.eval(), payload
