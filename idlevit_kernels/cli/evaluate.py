"""``idlevit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.engine import Options
from ..train.task import Place, evaluate_run
from .options import DataDir, Device, Download, OnBadImage, Threads, ValSplit, Workers, recipe_options, skips
from .shared import bad_input, failed_run


@recipe_options
def evaluate(
    source: Annotated[
        Path | None, typer.Argument(help="Checkpoint, or directory of a run; else --model, --weights and --data.")
    ] = None,
    *,
    given: dict[str, Any],
    ratios: Annotated[
        list[float] | None, typer.Option("--ratio", help="Keep ratio; repeat it for several. [that of the training]")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")] = False,
    data_dir: DataDir = None,
    download: Download = False,
    val_split: ValSplit = "validation",
    device: Device = None,
    threads: Threads = None,
    workers: Workers = 0,
    on_bad_image: OnBadImage = "stop",
) -> None:
    """Accuracy and images per second of a model, dense and idle side by side. Runs under torchrun, too."""
    with bad_input(), failed_run():
        options = Options(workers=workers, skip_unreadable=skips("eval", on_bad_image))
        evaluate_run(source, given, ratios or [], ema, options, Place(data_dir, download, val_split, device, threads))
