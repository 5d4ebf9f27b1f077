"""One idle block of DeiT-S over timm's dense block on all tokens and, the floor, on only the kept ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

import idlevit_kernels as ik
from idlevit_kernels.block.latency import random_inputs, rotating
from idlevit_kernels.block.timing import Timing, alternated_samples
from idlevit_kernels.measure.machine import find_device

DEVICE = find_device("bench", None)
TOKENS, CHANNELS = 197, 384
SECONDS = 3.0  # for each group


@functools.cache
def comparison(batch: int, num_keep: int) -> dict[str, list[float]]:
    """Seconds per call, of each form, measured in alternation."""
    torch.manual_seed(0)
    block = timm.create_model("deit_small_patch16_224").blocks[5].eval().requires_grad_(False).to(DEVICE)
    like = next(block.parameters())
    x = torch.randn(batch, TOKENS, CHANNELS, device=DEVICE)
    found = ik.idle_block(x, block, num_keep)
    with ik.use_backend("reference"):
        torch.testing.assert_close(found, ik.idle_block(x, block, num_keep), rtol=1e-4, atol=1e-4)
    every, kept = (batch, TOKENS, CHANNELS), (batch, num_keep + 1, CHANNELS)
    calls = {
        "idle": rotating(lambda x: ik.idle_block(x, block, num_keep), random_inputs(every, like)),
        "dense on kept": rotating(block, random_inputs(kept, like)),
        "dense on all": rotating(block, random_inputs(every, like)),
    }
    return alternated_samples(calls, SECONDS, device=DEVICE)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("num_keep", [137, 96, 67])
@pytest.mark.parametrize("form", ["idle", "dense on kept", "dense on all"])
def test_block(benchmark: Any, replay: Callable[..., Timing], batch: int, num_keep: int, form: str) -> None:
    benchmark.group = f"DeiT-S block, batch {batch:2d}, {num_keep} of 196 tokens"
    benchmark.name = form
    replay(comparison(batch, num_keep)[form], DEVICE)
