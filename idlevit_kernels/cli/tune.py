"""``idlevit tune``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..errors import value_error
from ..measure.info import run_facts
from ..measure.machine import find_device, find_dtype, set_threads
from ..measure.tune import Target, tune_schedule
from ..models.create import create_model
from .options import MODEL
from .shared import bad_input, progress, temporary_beside


def tune(
    target_ms: Annotated[float | None, typer.Option(help="Milliseconds that a batch may take.")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Over the dense timm model in eager mode.")] = None,
    target_macs: Annotated[float | None, typer.Option(help="Billions of multiply-accumulates of an image.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the schedule here, as JSON.")
    ] = None,
    model: Annotated[str, MODEL] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images in a batch: a schedule is for one size.")] = 8,
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:INDEX; by default the best there is.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to measure for, about.")] = 60.0,
) -> None:
    """Finds the schedule with the most kept tokens that meets a target on this device, and measures it."""
    given = {"ms": target_ms, "speedup": target_speedup, "macs": target_macs}
    targets = [Target(kind, value) for kind, value in given.items() if value is not None]
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        with bad_input():
            if len(targets) != 1:
                expected = "exactly one of --target-ms, --target-speedup and --target-macs"
                raise value_error("tune", "target", expected, [f"--target-{target.kind}" for target in targets])
            set_threads("tune", threads)
            temporary = output and stack.enter_context(temporary_beside(output, "tune", "output"))
            torch_device, torch_dtype = find_device("tune", device), find_dtype("tune", dtype)
            dense, size = create_model("tune", model, image_size)
            dense.eval().requires_grad_(False).to(torch_device, torch_dtype)
            with progress() as on_progress:
                target = targets[0]
                scale = 1e9 if target.kind == "macs" else 1.0
                goal = Target(target.kind, target.value * scale)
                tuned = tune_schedule(dense, goal, batch, size, seconds=seconds, on_progress=on_progress)
        command = ["idlevit", *sys.argv[1:]]
        facts = run_facts(command, torch_device, model=model, input_size=size, batch=batch, dtype=dtype)
        units = {"ms": "ms a batch", "speedup": "times as fast as dense", "macs": "GMACs"}[target.kind]
        what = "multiply-accumulates" if target.kind == "macs" else "time"
        console.print(
            f"{model}, batch {batch}, {dtype}, {facts['device_name']}, {torch.get_num_threads()} CPU threads\n"
            f"target {target.value:g} {units}; reached {tuned.reached / scale:.4g}, measured afresh on the whole model"
            f" ({tuned.deviation:+.1%} of the {what} that the target allows)"
        )
        console.print(f"kept of {tuned.num_image_tokens} tokens, by layer: {' '.join(map(str, tuned.num_keep))}")
        console.print(
            f"dense {tuned.dense.median * 1e3:.1f} ms, idle {tuned.idle.median * 1e3:.1f} ms"
            f" ({tuned.idle.p20 * 1e3:.1f}-{tuned.idle.p80 * 1e3:.1f}), speed-up"
            f" {tuned.dense.median / tuned.idle.median:.2f}x; {tuned.macs / 1e9:.3f} GMACs"
        )
        if output and temporary:
            temporary.write_text(json.dumps({**facts, **dataclasses.asdict(tuned)}, indent=2) + "\n")
            os.replace(temporary, output)
            console.print(f"written: {output}")
