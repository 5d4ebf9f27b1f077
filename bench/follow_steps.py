"""What it costs that idle tokens follow, step by step, beside a dense block: ``python bench/follow_steps.py``.

Each step is timed alone, on what the step before hands it, in alternation with all others, with the same step in plain
PyTorch, and with the dense block. The share is that of the dense block's time; the limits are 8 % at DeiT-S, batch 8,
and 12 % at 1,369 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from idlevit_kernels.block.timing import Timing, alternate
from idlevit_kernels.measure.info import run_facts
from idlevit_kernels.measure.tables import console_for
from idlevit_kernels.ops.backends import cpu_follow
from idlevit_kernels.ops.reference.follow_form import weight_projection
from idlevit_kernels.ops.reference.select_spread import select_spread

MODEL, LAYER, CHANNELS, DIMENSIONS = "deit_small_patch16_224", 5, 384, 32
SHAPES = {"DeiT-S, batch 8": (8, 196, 120), "DINOv2-S/14 518, batch 1": (1, 1369, 840)}  # B, N, K
STEPS = ("project", "select and assign", "mean and norm", "follow")


def tokens_like_those_of_an_image(batch: int, count: int) -> Tensor:
    """[B, 1 + N, C]: 40 kinds of tokens and noise, so that groups are of different sizes."""
    kinds = torch.randn(batch, 40, CHANNELS)
    which = torch.randint(40, (batch, count, 1)).expand(-1, -1, CHANNELS)
    return torch.cat(
        [torch.randn(batch, 1, CHANNELS), kinds.gather(1, which) + 0.5 * torch.randn(batch, count, CHANNELS)], 1
    )


def calls(batch: int, num_tokens: int, num_keep: int) -> dict[str, Callable[[], Any]]:
    block = timm.create_model(MODEL).blocks[LAYER].eval().requires_grad_(False)
    x = tokens_like_those_of_an_image(batch, num_tokens)
    norm = (block.norm1.weight, block.norm1.bias, block.norm1.eps)
    projection = weight_projection(block, DIMENSIONS)
    features = cpu_follow.project_tokens(x, *norm, projection, 1)
    indices, groups, sizes = cpu_follow.spread_groups(features, num_keep, 1, None)
    branch1, branch2 = torch.randn(2, batch, 1 + num_keep, CHANNELS)
    follow = (x, groups, branch1, None, 1.0, branch2, None, 1.0)
    bind = functools.partial
    of_group = groups.unsqueeze(-1).expand(-1, -1, CHANNELS)

    def plain_assign() -> tuple[Tensor, Tensor]:
        kept = select_spread(features, num_keep, 1, None)
        own = (kept[:, 1:] - 1).unsqueeze(-1).expand(-1, -1, DIMENSIONS)
        group = (features @ features.gather(1, own).mT).argmax(2)
        return group, torch.zeros(batch, num_keep).scatter_add_(1, group, torch.ones(group.shape))

    def plain_mean() -> Tensor:
        total = torch.zeros(batch, 1 + num_keep, CHANNELS).scatter_add_(1, of_group, x)
        return block.norm1(total / sizes.unsqueeze(-1))

    return {
        "project": bind(cpu_follow.project_tokens, x, *norm, projection, 1),
        "select": bind(cpu_follow.select_spread, features, num_keep, 1, None),
        "assign": bind(cpu_follow.assign_tokens, features, indices, 1, None),
        "select and assign": bind(cpu_follow.spread_groups, features, num_keep, 1, None),
        "mean and norm": bind(cpu_follow.gather_mean_norm, x, groups, sizes, *norm),
        "follow": bind(cpu_follow.follow_tokens, *follow),
        "follow in place": bind(cpu_follow.follow_tokens_, x.clone(), *follow[1:]),
        "project, plain": lambda: F.normalize(block.norm1(x[:, 1:]) @ projection, dim=-1),
        "select and assign, plain": plain_assign,
        "mean and norm, plain": plain_mean,
        "follow, plain": lambda: x + (branch1 + branch2).gather(1, of_group),
        "dense block": bind(block, x),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="for everything, about (default: %(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    timings: dict[str, dict[str, Timing]] = {}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            timings[name] = alternate(calls(*shape), options.seconds / len(SHAPES))
    table = Table("step, microseconds (share of the dense block)", *SHAPES, box=box.SIMPLE_HEAD, pad_edge=False)

    def cell(name: str, seconds: float) -> str:
        return f"{seconds * 1e6:.0f} ({seconds / timings[name]['dense block'].median:.1%})"

    for step in timings[next(iter(SHAPES))]:
        table.add_row(step, *(cell(name, timings[name][step].median) for name in SHAPES))
    for kind in ("", ", plain"):
        total = {name: sum(timings[name][step + kind].median for step in STEPS) for name in SHAPES}
        table.add_row(f"all four{kind}", *(cell(name, total[name]) for name in SHAPES), style="bold")
    console_for(table).print(table)
    if options.json:
        shapes = {name: dict(zip("BNK", shape, strict=True)) for name, shape in SHAPES.items()}
        result: dict[str, Any] = {
            **run_facts(["python", *sys.argv], torch.device("cpu"), shapes=shapes),
            "rows": [
                {"shape": name, "step": step, "seconds": t.median, "p20": t.p20, "p80": t.p80, "samples": t.n}
                for name, found in timings.items()
                for step, t in found.items()
            ],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
