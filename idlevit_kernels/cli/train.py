"""``idlevit train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.engine import Options
from ..train.task import Place
from ..train.task import train as run_training
from .options import DataDir, Device, Download, OnBadImage, Threads, ValSplit, Workers, recipe_options, skips
from .shared import bad_input, failed_run


@recipe_options
def train(
    *,
    given: dict[str, Any],
    output: Annotated[Path | None, typer.Option(help="Directory for checkpoints and logs.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto: go on from what --output holds; or a checkpoint.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    val_split: ValSplit = "validation",
    device: Device = None,
    threads: Threads = None,
    workers: Workers = 0,
    on_bad_image: OnBadImage = "stop",
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; there is one after each epoch in any case.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
) -> None:
    """Finetunes an IdleViT, by default on handwritten digits: first dense, then idle. Runs under torchrun, too.

    The recipe's defaults, in brackets with their source, are the paper's for ImageNet; digits have their own where none
    is given. A run can be ended at any time and goes on with --resume auto.
    """
    with bad_input(), failed_run():
        skip = skips("train", on_bad_image)
        options = Options(output, workers, checkpoint_steps, skip_unreadable=skip, compile=compiled)
        run_training(given, options, Place(data_dir, download, val_split, device, threads), resume)
