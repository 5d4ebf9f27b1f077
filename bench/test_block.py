"""One idle block of DeiT-S over timm's dense block on all tokens and, the floor, on only the kept ones."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import idlevit_kernels as ik

TOKENS, CHANNELS = 197, 384


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("num_keep", [137, 96, 67])
@pytest.mark.parametrize("form", ["idle", "dense on kept", "dense on all"])
def test_block(benchmark: Any, batch: int, num_keep: int, form: str) -> None:
    benchmark.group = f"DeiT-S block, batch {batch}, {num_keep} of 196 tokens"
    block = timm.create_model("deit_small_patch16_224").blocks[5].eval()
    x = torch.randn(batch, TOKENS, CHANNELS)
    if form == "idle":
        benchmark(ik.idle_block, x, block, num_keep)
    else:
        benchmark(block, x[:, : num_keep + 1].contiguous() if form == "dense on kept" else x)
