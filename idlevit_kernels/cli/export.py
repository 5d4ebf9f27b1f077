"""``idlevit export``."""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

from ..block.timing import alternate
from ..deploy.export import SUFFIXES, export_model, largest_difference, load_exported
from ..errors import value_error
from ..measure.macs import count_macs
from ..measure.tables import console_for
from .options import KEEP_RATIO, MODEL, PRETRAINED, SCHEDULE, WEIGHTS
from .shared import bad_input, dense_and_idle


def export(
    output: Annotated[Path, typer.Argument(metavar="FILE", help=".onnx, or .pt2 for the other formats.")],
    format: Annotated[str, typer.Option(help="onnx, torch-export or aoti.")] = "onnx",
    model: Annotated[str, MODEL] = "deit_small_patch16_224",
    keep_ratio: Annotated[float | None, KEEP_RATIO] = None,
    schedule: Annotated[Path | None, SCHEDULE] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    weights: Annotated[Path | None, WEIGHTS] = None,
    pretrained: Annotated[bool, PRETRAINED] = False,
    batch: Annotated[int, typer.Option(help="Images in a batch, for the timing; the file takes any number.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time to measure for, beside the dense model; 0: not at all.")] = 20.0,
) -> None:
    """Writes an idle model for onnxruntime or PyTorch, checks its logits and times it beside the dense one there."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    console = Console(highlight=False)
    with bad_input():
        if batch < 1:
            raise value_error("export", "batch", "at least 1", batch)
        if seconds < 0:
            raise value_error("export", "seconds", "at least 0", seconds)
        dense, idle, size = dense_and_idle("export", model, keep_ratio, schedule, image_size, weights, pretrained)
        export_model(idle, output, format, size)
    exported = load_exported(output, format)
    difference = largest_difference(idle, exported, size)
    if not difference <= 1e-4:
        print(f"idlevit: export: the logits of {output} differ from PyTorch's by {difference:.1e}", file=sys.stderr)
        raise typer.Exit(1)
    console.print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB; logits as in PyTorch, to {difference:.1e}")
    if not seconds:
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        beside = export_model(dense, Path(folder, "dense" + SUFFIXES[format]), format, size)
        images = torch.randn(batch, *size)
        calls = {"dense": load_exported(beside, format), "idle": exported}
        timings = alternate({name: functools.partial(call, images) for name, call in calls.items()}, seconds)
    bound = count_macs(dense, size).total / count_macs(idle, size).total
    speedup = timings["dense"].median / timings["idle"].median
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in (f"batch {batch}", "images/s", "p20-p80", "speed-up", "MAC bound", "reached"):
        table.add_column(title, justify="right")
    for name, t in timings.items():
        extra = [f"{speedup:.2f}x", f"{bound:.2f}x", f"{speedup / bound:.0%}"] if name == "idle" else []
        table.add_row(name, f"{batch / t.median:.1f}", f"{batch / t.p80:.1f}-{batch / t.p20:.1f}", *extra)
    console_for(table).print(Group(table, ""))
