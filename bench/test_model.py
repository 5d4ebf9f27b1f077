"""Whole models: dense and IdleViT, eager and compiled, and the other methods of ``peers``, on DeiT-S at keep ratio 0.7.

The table is for a look; ``idlevit bench --peers`` times all of them in alternation and is what README quotes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from idlevit_kernels.benchmark import DENSE, ModelBenchmark

MODEL, KEEP_RATIO = "deit_small_patch16_224", 0.7
EQUAL = {"IdleViT": "released order"}  # must give the same logits


@pytest.fixture(scope="module")
def models() -> ModelBenchmark:
    torch.manual_seed(0)
    return ModelBenchmark(MODEL, [KEEP_RATIO], [1], peers=True)


METHODS = [
    "dense",
    "IdleViT",
    "released order",
    "EViT",
    "EViT, equal MACs",
    "ToMe, equal MACs",
    "DynamicViT, equal MACs",
]
CASES = [
    pytest.param(batch, method, compiled, marks=[] if batch == 8 and not compiled else pytest.mark.full)
    for batch, compiled, method in itertools.product((1, 8, 32), (False, True), METHODS)
]


@pytest.mark.parametrize(("batch", "method", "compiled"), CASES)
def test_model(benchmark: Any, models: ModelBenchmark, batch: int, method: str, compiled: bool) -> None:
    benchmark.group = f"{MODEL}, keep ratio {KEEP_RATIO}, batch {batch}{', compiled' if compiled else ''}"
    by_name = {variant.method: (variant, model) for variant, model in models.models.items()}
    variant, model = by_name[method]
    like = next(models.dense.parameters())
    inputs = torch.randn(3, batch, *models.input_size, device=like.device, dtype=like.dtype)
    wanted = by_name[EQUAL.get(method, method)][1](inputs[0])
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(inputs[0]), wanted, rtol=1e-3, atol=1e-3)

    rotation = itertools.cycle(inputs)
    synchronize = torch.cuda.synchronize if like.is_cuda else lambda: None

    def run() -> None:
        model(next(rotation))
        synchronize()

    benchmark(run)
    macs = models.macs[variant]
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info |= {
        "setting": variant.setting,
        "images_per_s": batch / seconds,
        "gflop_per_s": 2 * batch * macs / seconds / 1e9,
        "mac_bound": models.macs[DENSE] / macs,
    }
