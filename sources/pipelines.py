"""Pipelines that Albumentations saved, as operations of --augment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from base import errors
from base.errors import DataError, UsageError
from sources.randomness import Draw, KeyedRandom, Operation

FIX = "write it with albumentations.save(pipeline, path, data_format='yaml'), for single images"


def operation(path: str, randomness: KeyedRandom) -> Operation:
    """Return the operation of a file that `albumentations.save` wrote. Raises UsageError and DataError."""
    policy = _load(path)
    # Not set_random_seed: it gives every transform the same stream, so they would all fire together.
    policy.set_random_state(randomness.generator, randomness.library)
    randomness.uses_library = True

    def apply(image: np.ndarray, draw: Draw) -> np.ndarray:
        try:
            changed = policy(image=image)["image"]
        except Exception as error:  # Albumentations' transforms raise anything
            raise DataError(f"--augment {path}: {errors.one_line(str(error))[:200]}", FIX) from error
        if getattr(changed, "shape", None) != image.shape or changed.dtype != np.uint8:
            what = f"--augment {path} turns {_form(image)} into {_form(changed)}"
            raise DataError(what, "leave crops to rrc or padcrop, and normalization to train.py")
        return changed

    return apply


def _form(value: Any) -> str:
    return f"{getattr(value, 'dtype', type(value).__name__)} of shape {tuple(getattr(value, 'shape', ()))}"


def _load(path: str) -> Callable:
    """Build the pipeline of a file from Albumentations' own transforms; nothing else can be named there."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for updates
    A = errors.optional("albumentations", needed_for=f"--augment {path}")
    try:
        with warnings.catch_warnings():
            # Otherwise a misspelt argument would only be ignored.
            warnings.filterwarnings("error", message=r".*are not valid for transform")
            return A.Compose([A.load(path, data_format="yaml")])  # JSON is YAML
    except OSError as error:
        raise UsageError(f"--augment {path}: {error.strerror}", "check the path") from None
    except Exception as error:  # wrong YAML, unknown classes (KeyError), wrong values (pydantic), ...
        reason = errors.one_line(f"{type(error).__name__}: {error}")[:200]
        raise UsageError(f"--augment {path} is not a pipeline of Albumentations ({reason})", FIX) from None
