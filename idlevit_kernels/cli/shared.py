"""What several commands do: they refuse what does not fit, show how far they are, write a file, make a model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import ArgumentError, BackendError, value_error
from ..models import apply_idle, load_released
from ..models.create import create_model, sharing_weights
from ..schedule import read_schedule
from ..train.checkpoint import CheckpointError
from ..train.data import UnreadableImage
from ..train.engine import NonFiniteLoss, Stopped


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turns the error that an argument caused into one line and exit code 2; OSError for the file that it names,
    ImportError for the library that it needs. Any other error is a defect, and shows its traceback.
    """
    try:
        yield
    except (ArgumentError, BackendError, ImportError, OSError) as error:
        print(f"idlevit: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def failed_run() -> Iterator[None]:
    """A run that cannot go on says why: exit code 1, or that of the signal which ended it."""
    try:
        yield
    except (CheckpointError, NonFiniteLoss, Stopped, UnreadableImage) as error:
        print(f"idlevit: {error}", file=sys.stderr)
        raise typer.Exit(error.code if isinstance(error, Stopped) else 1) from None


@contextlib.contextmanager
def temporary_beside(path: Path, command: str, option: str) -> Iterator[Path]:
    """An empty file to write and then move to ``path``; made now, so that a bad path shows before the work."""
    if path.is_dir():
        raise IsADirectoryError(f"{command}: --{option} must be a file, got the directory {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(
            f"{command}: --{option} must be a file that can be written, got {path}: {error.strerror}"
        ) from None
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    columns = TextColumn("{task.description:<17}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("warming up", total=1.0)
        yield lambda label, done: progress.update(task, description=label, completed=done)


def dense_and_idle(
    op: str,
    name: str,
    keep_ratio: float | None,
    schedule: Path | None,
    image_size: int | None,
    weights: Path | None,
    pretrained: bool,
) -> tuple[Any, Any, tuple[int, int, int]]:
    """The dense model, the idle one around the same weights, and the size of their input."""
    if weights is not None and pretrained:
        raise value_error(op, "weights", "left out where --pretrained is given", str(weights))
    dense, input_size = create_model(op, name, image_size, pretrained)
    dense.eval().requires_grad_(False)
    if weights is not None:
        load_released(dense, weights)
    ratios = None if schedule is None else read_schedule(op, schedule)
    return dense, apply_idle(sharing_weights(dense), keep_ratio, ratios), input_size
