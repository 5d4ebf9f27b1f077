"""One training step of DeiT-S, time and peak memory, and the token cut loss alone: ``python bench/train_step.py``.

Four forms of the step (forward, loss, backward, AdamW; the teacher's outputs are given, its forward is left out):

- idle: IdleViT with token cut loss and distillation, as this package trains it.
- masked: the same loss in the paper's form (``ops/reference/masked_form.py``): dense attention with idle keys masked,
  its logits stored, as the cut loss needs them.
- idle, no cut: IdleViT with distillation alone.
- dense: finetuning of the dense timm model (with its fused attention) on the labels alone.

Time is taken of all forms in alternation in one process. Memory is taken of each form in a process of its own: the
highest resident size within the second step over that before it. The C library is told to give every freed buffer
back to the system (MALLOC_MMAP_THRESHOLD_), so resident is what is allocated; parameters, gradients of the first step
and the optimizer's state exist before.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.block.timing import alternate
from idlevit_kernels.measure.info import run_facts
from idlevit_kernels.ops.reference.masked_form import masked_form

MODEL, KEEP_RATIO, CLASSES = "deit_small_patch16_224", 0.7, 1000
FORMS = ("idle", "masked", "idle, no cut", "dense")
CUT_FORMS = ("tiled", "plain")
CUT_SHAPE = (8, 1370, 384)  # DeiT-S at 592 pixels; or DINOv2's 518 pixels with patches of 14


def make_step(form: str) -> Callable[[Tensor], Any]:
    """A function of images that takes one training step and returns its loss."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).train()
    if form.startswith("idle"):
        ik.apply_idle(model, KEEP_RATIO)
    wrapped = ik.IdleViTForTraining(model, cut="both" if form == "idle" else "none")
    criterion = ik.IdleViTLoss(
        nn.CrossEntropyLoss(),
        cut_weight=20.0 if form in ("idle", "masked") else 0.0,
        distill_weight=0.0 if form == "dense" else 10.0,
    )
    ratios = ik.idle_schedule(len(model.blocks), KEEP_RATIO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(images: Tensor) -> Tensor:
        targets = torch.arange(len(images))
        teacher = ik.IdleViTOutput(torch.ones(len(images), CLASSES), torch.ones(len(images), 384), images[0], ())
        if form == "masked":
            logits, tokens, token_cut, _ = masked_form(model, images, ratios, "cls", "both")
            out = ik.IdleViTOutput(logits, tokens[:, 0], token_cut, ())
        else:
            out = wrapped(images)
        loss, _ = criterion(out, targets, None if form == "dense" else teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step


def make_cut(form: str) -> Callable[[], Any]:
    """The token cut loss of DeiT-S and its backward, from queries and keys that are there."""
    B, T, C = CUT_SHAPE
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, C, generator=generator).requires_grad_() for _ in range(2))
    keep = int(KEEP_RATIO * (T - 1))
    indices = ik.select_tokens(torch.randn(B, T, generator=generator), keep)
    scale = (C // 6) ** -0.5 / 6

    def plain() -> Tensor:
        attention = (scale * q @ k.mT).softmax(-1)  # [B, T, T]
        mask = torch.zeros(B, T).scatter_(1, indices, 1.0)
        rows, columns = mask[:, :, None], mask[:, None, :]
        different = (rows - columns).abs()
        different[:, :, :1] = 0.0
        inter = (different * attention).sum(-1).square().mean()
        return inter + ((rows * columns * attention).sum(-1) - mask).square().mean()

    def run() -> None:
        q.grad = k.grad = None
        (plain() if form == "plain" else ik.token_cut_loss(q, k, indices, scale)).backward()

    return run


def _status(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_memory(call: Callable[[], Any], first: Callable[[], Any]) -> int:
    """Bytes that ``call`` adds at its peak to what is resident after ``first``."""
    first()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def measure_memory(form: str, batch: int) -> int:
    if form in CUT_FORMS:
        run = make_cut(form)
        return peak_memory(run, lambda: None)
    step = make_step(form)
    images = torch.randn(batch, 3, 224, 224)
    return peak_memory(functools.partial(step, images), functools.partial(step, images[:1]))


def memory_in_subprocess(form: str, batch: int, threads: int) -> int:
    command = [sys.executable, __file__, "--memory-of", form, "--batch", str(batch), "--threads", str(threads)]
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=80, help="for the times of the steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--memory-of", choices=(*FORMS, *CUT_FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.batch))
        return

    console = Console(stderr=True)
    memory = {form: memory_in_subprocess(form, args.batch, args.threads) for form in (*FORMS, *CUT_FORMS)}
    images = [torch.randn(args.batch, 3, 224, 224) for _ in range(2)]
    with console.status("timing"):
        steps = {form: functools.partial(make_step(form), images[0]) for form in FORMS}
        times = alternate(steps, args.seconds, min_rounds=3)
        times |= alternate({form: make_cut(form) for form in CUT_FORMS}, args.seconds / 8, min_rounds=3)
    rows = []
    for group, other in ((FORMS, "masked"), (CUT_FORMS, "plain")):
        table = Table("form", "seconds", "20th to 80th", f"of {other}", "peak MB", f"of {other}")
        for form in group:
            t, megabytes = times[form], memory[form] / 1e6
            of_time, of_memory = t.median / times[other].median, memory[form] / memory[other]
            rows.append({
                "form": form, "seconds": t.median, "p20": t.p20, "p80": t.p80, "samples": t.n,
                "peak_bytes": memory[form], "over": other, "time_ratio": of_time, "memory_ratio": of_memory,
            })  # fmt: skip
            spread = f"{t.p20:.2f} to {t.p80:.2f}"
            table.add_row(form, f"{t.median:.2f}", spread, f"{of_time:.2f}", f"{megabytes:.0f}", f"{of_memory:.2f}")
        console.print(table)
    console.print(f"idle / dense: {times['idle'].median / times['dense'].median:.2f} of the time")
    if args.json:
        measured = {"keep_ratio": KEEP_RATIO, "batch": args.batch, "dtype": "float32", "cut_shape": CUT_SHAPE}
        report = {
            **run_facts(["python", *sys.argv], torch.device("cpu"), model=MODEL, **measured),
            "rows": rows,
            "idle_over_dense": times["idle"].median / times["dense"].median,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
