"""Where an idle block's time goes, step by step, and what a dense block takes: ``python bench/block_steps.py``.

Each step is timed alone, on what the step before hands it, in alternation with all others and with the whole blocks.
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

import idlevit_kernels as ik
from idlevit_kernels.block.parts import Parts, find_parts
from idlevit_kernels.block.timing import Timing, alternate
from idlevit_kernels.measure.info import run_facts
from idlevit_kernels.measure.tables import console_for

MODEL, LAYER, TOKENS, CHANNELS = "deit_small_patch16_224", 5, 197, 384


def calls(batch: int, num_keep: int) -> dict[str, Callable[[], Any]]:
    """The steps in their order, then the whole blocks: idle, dense on the kept tokens, dense on all."""
    block = timm.create_model(MODEL).blocks[LAYER].eval().requires_grad_(False)
    x = torch.randn(batch, TOKENS, CHANNELS)
    norm1, norm2 = ((n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2))
    qkv, parts, nothing = block.attn.qkv, find_parts(block), ik.Context()
    assert isinstance(parts, Parts), parts
    direction = ik.cls_direction(x, *norm1, qkv.weight, qkv.bias)
    scores = ik.token_scores(x, direction, *norm1)
    indices, normed = ik.select_gather_norm(x, scores, num_keep, 1, *norm1)
    branch = parts.attention(normed, nothing)
    tokens, hidden = ik.gather_add_norm(x, indices, branch, None, 1.0, *norm2)
    out = parts.mlp(hidden)
    kept = x[:, : num_keep + 1].contiguous()
    bind = functools.partial
    return {
        "direction": bind(ik.cls_direction, x, *norm1, qkv.weight, qkv.bias),
        "score": bind(ik.token_scores, x, direction, *norm1),
        "select, gather, norm": bind(ik.select_gather_norm, x, scores, num_keep, 1, *norm1),
        "attention": bind(parts.attention, normed, nothing),
        "gather, add, norm": bind(ik.gather_add_norm, x, indices, branch, None, 1.0, *norm2),
        "MLP": bind(parts.mlp, hidden),
        "scatter, add": bind(ik.scatter_add_tokens, x, indices, tokens, out, None, 1.0),
        "idle block": bind(ik.idle_block, x, block, num_keep),
        "dense block on kept tokens": bind(block, kept),
        "dense block on all tokens": bind(block, x),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-keep", type=int, default=96, help="of 196 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for everything, about (default: %(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    rows = []
    table = Table("microseconds (p20-p80)", *(f"batch {b}" for b in options.batch), box=box.SIMPLE_HEAD, pad_edge=False)
    timings: dict[int, dict[str, Timing]] = {}
    with torch.inference_mode():
        for batch in options.batch:
            share = options.seconds * (0.1 + 0.9 * batch / sum(options.batch))
            timings[batch] = alternate(calls(batch, options.num_keep), share)
    for name in timings[options.batch[0]]:
        found = [timings[batch][name] for batch in options.batch]
        table.add_row(name, *(f"{t.median * 1e6:.0f} ({t.p20 * 1e6:.0f}-{t.p80 * 1e6:.0f})" for t in found))
        for batch, t in zip(options.batch, found, strict=True):
            rows.append({"batch": batch, "step": name, "seconds": t.median, "p20": t.p20, "p80": t.p80, "samples": t.n})
    console_for(table).print(table)
    if options.json:
        command = ["python", "bench/block_steps.py", *(arguments or sys.argv[1:])]
        measured = {"model": MODEL, "num_keep": options.num_keep, "num_tokens": TOKENS}
        facts = run_facts(command, torch.device("cpu"), **measured)
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
