"""Whole models: dense and IdleViT, eager and compiled, and the other methods of ``peers``, on DeiT-S at keep ratio 0.7.

``idlevit bench --peers`` takes more keep ratios, batch sizes and time; its figures are those in README.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import peers_of

from idlevit_kernels.block.latency import random_inputs, rotating
from idlevit_kernels.block.timing import Timing, alternated_samples
from idlevit_kernels.measure.benchmark import DENSE, ModelBenchmark

MODEL, KEEP_RATIO = "deit_small_patch16_224", 0.7
SECONDS = 20.0  # for each group
EQUAL = {"IdleViT": "released order"}  # must give the same logits
METHODS = [
    "dense",
    "IdleViT",
    "released order",
    "EViT",
    "EViT, equal MACs",
    "ToMe, equal MACs",
    "DynamicViT, equal MACs",
    "Evo-ViT, equal MACs",
]


@functools.cache
def measured() -> ModelBenchmark:
    torch.manual_seed(0)
    return ModelBenchmark(MODEL, [KEEP_RATIO], [1], peers=peers_of)


@functools.cache
def comparison(batch: int, compiled: bool) -> dict[str, list[float]]:
    """Seconds per call, of each method, measured in alternation."""
    models = {variant.method: model for variant, model in measured().models.items()}
    like = next(measured().dense.parameters())
    shape = (batch, *measured().input_size)
    x = torch.randn(shape, device=like.device, dtype=like.dtype)
    calls, inputs = {}, random_inputs(shape, like)
    for method in METHODS:
        model = models[method]
        if compiled:
            torch.compiler.reset()
            model = torch.compile(model, fullgraph=True, dynamic=False)
        torch.testing.assert_close(model(x), models[EQUAL.get(method, method)](x), rtol=1e-3, atol=1e-3)
        calls[method] = rotating(model, inputs)
    return alternated_samples(calls, SECONDS, device=like.device)


CASES = [
    pytest.param(batch, method, compiled, marks=[] if batch == 8 and not compiled else pytest.mark.full)
    for batch, compiled, method in itertools.product((1, 8, 32), (False, True), METHODS)
]


@pytest.mark.parametrize(("batch", "method", "compiled"), CASES)
def test_model(benchmark: Any, replay: Callable[..., Timing], batch: int, method: str, compiled: bool) -> None:
    benchmark.group = f"{MODEL}, keep ratio {KEEP_RATIO}, batch {batch:2d}{', compiled' if compiled else ''}"
    benchmark.name = method
    samples = comparison(batch, compiled)[method]
    models = measured()
    variant = next(variant for variant in models.models if variant.method == method)
    macs = models.macs[variant]
    timing = replay(samples, models.device, setting=variant.setting, mac_bound=models.macs[DENSE] / macs)
    benchmark.extra_info["images_per_s"] = batch / timing.median
    benchmark.extra_info["gflop_per_s"] = 2 * batch * macs / timing.median / 1e9
