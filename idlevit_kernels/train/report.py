"""What a run tells of itself: a progress bar, CSV files, TensorBoard, tables."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..measure.tables import console_for
from .checkpoint import write
from .engine import StepLog

log = logging.getLogger(__name__)


class Report:
    """A context in which a run is shown and logged; for the first process.

    Args:
        name: of the run, in the bar and in the lines.
        epochs: of the run.
        console: where the bar and a line for each epoch go.
        output: directory of ``steps.csv``, ``epochs.csv`` and TensorBoard's files; None writes none.
        step: where the run goes on; what was logged beyond it, before an interruption, is dropped.
    """

    def __init__(self, name: str, epochs: int, console: Console, output: Path | None, step: int = 0):
        self.name, self.epochs, self.console, self.output = name, epochs, console, output
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(name, total=None, completed=step)
        self._state = Text()  # below the bar, as the losses alone fill a line
        self._live = Live(Group(self._progress, self._state), console=console, transient=True)
        self._told = False
        self._board: Any = None
        if output is not None:
            rows = [row for row in _read(output / "steps.csv") if int(row["step"]) <= step]
            if rows:
                self._write("steps.csv", rows)
            else:
                (output / "steps.csv").unlink(missing_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
            except ImportError:
                console.print("no TensorBoard logs: pip install 'idlevit-kernels[train]'", style="dim")

    def __enter__(self) -> Report:
        self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.stop()
        if self._board is not None:
            self._board.close()

    def on_log(self, row: StepLog) -> None:
        losses = " ".join(f"{name} {value:.3g}" for name, value in row.losses.items())
        self._state.plain = f"{losses} lr {row.lr:.2g} {row.images_per_second:.0f} images/s"
        self._progress.update(self._task, completed=row.step, total=row.steps)
        speed = round(row.images_per_second, 1)
        flat = {"step": row.step, "epoch": row.epoch, **row.losses, "lr": row.lr, "images_per_second": speed}
        self._append("steps.csv", flat)
        if self._board is not None:
            for name, value in flat.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, row.step)

    def on_epoch(self, history: list[dict[str, Any]], step: int) -> None:
        row = history[-1]
        losses = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in _NO_LOSS)
        self.console.print(
            f"{self.name}: epoch {row['epoch'] + 1}/{self.epochs}: top-1 {row['top1']:.2f}, {losses},"
            f" lr {row['lr']:.2g}, {row['images_per_second']:.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )
        self._write("epochs.csv", history)
        if self._board is not None:
            for name in ("top1", "top5"):
                self._board.add_scalar(f"val/{name}", row[name], step)

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if self.output is not None:
            try:
                write(self.output / name, _text(rows).encode())
            except OSError as error:
                self._tell(error)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.output is not None:
            path = self.output / name
            try:
                with open(path, "a", newline="") as file:
                    file.write(_text([row], header=file.tell() == 0))
            except OSError as error:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        """Once: a log that cannot be written is no reason to stop."""
        if not self._told:
            log.error("a log cannot be written, and the run goes on without it: %s", error)
        self._told = True


_NO_LOSS = ("epoch", "lr", "top1", "top5", "images_per_second")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row and None not in row.values()]  # whole lines, after a kill


def _text(rows: Sequence[dict[str, Any]], header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the title and a table with one line for each row; numbers to the right."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value in rows[0].items():
        shown.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        shown.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()))
    console = console_for(shown)
    console.print(title, soft_wrap=True)
    console.print(shown)
