"""Checkpoints that survive: written whole or not at all, read without running code, the one before kept."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "idlevit_kernels training checkpoint, version 2"
_PREFIX, _SUFFIX = "checkpoint-", ".pt"

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A file that is no whole checkpoint of this package, or none that can be read where one must be."""


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``: a file from elsewhere cannot run code.

    Raises:
        CheckpointError: it is truncated or otherwise damaged, or not one of this package.
        OSError: it is not there, or cannot be read.
    """
    content = io.BytesIO(path.read_bytes())  # so that an OSError below is no trouble of the disk
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint: {why}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = (
            f"a dict with {', '.join(list(map(str, state))[:6])}" if isinstance(state, dict) else type(state).__name__
        )
        raise CheckpointError(
            f"{path} is not a training checkpoint of this package (expected {FORMAT!r}): it holds {found}"
        )
    return state


def paths(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the newest first."""
    return sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}"), reverse=True)


def newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; None where there is none at all.

    Raises:
        CheckpointError: there are some and none can be read. Beginning anew would overwrite them.
    """
    reasons = []
    for path in paths(directory):
        try:
            return path, load(path)
        except (CheckpointError, OSError) as error:
            log.warning("%s; trying the one before", error)
            reasons.append(str(error))
    if reasons:
        raise CheckpointError("\n  ".join([f"no checkpoint in {directory} can be read:", *reasons]))
    return None


def save(directory: Path, state: dict[str, Any], step: int, keep: int = 2) -> Path:
    """Writes ``checkpoint-<step>.pt`` so that it appears complete or not at all, then removes all but the newest.

    Raises:
        OSError: it cannot be written, as on a full disk. What was there before is untouched.
    """
    path = directory / f"{_PREFIX}{step:09d}{_SUFFIX}"
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    write(path, content.getbuffer())
    for old in paths(directory)[keep:]:
        old.unlink(missing_ok=True)
    return path


def write(path: Path, content: bytes | memoryview) -> None:
    """Puts the content into a file by way of a temporary one, on the disk before it gets the file's name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        free = shutil.disk_usage(path.parent).free / 2**20
        sizes = f"{len(content) / 2**20:.1f} MiB to write, {free:.1f} MiB free"
        raise OSError(error.errno, f"{error.strerror} ({sizes})", str(path)) from None
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def random_state() -> dict[str, Any]:
    """Of torch (CPU and the current GPU), numpy and Python, in types that ``weights_only`` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@contextlib.contextmanager
def isolated_random(*seed: int) -> Iterator[None]:
    """Seeds torch, numpy and Python inside, all three from all the numbers, and leaves no trace behind."""
    words = np.random.SeedSequence(seed).generate_state(4)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
