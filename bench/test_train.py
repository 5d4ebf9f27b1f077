"""One training step of DeiT-S in the four forms of ``train_step.py``, which takes their memory as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from train_step import FORMS, make_step

from idlevit_kernels.block.latency import random_inputs, rotating
from idlevit_kernels.block.timing import Timing, alternated_samples

BATCH = 4
SECONDS = 15.0


@functools.cache
def comparison() -> dict[str, list[float]]:
    """Seconds per step, of each form, measured in alternation."""
    with torch.inference_mode(False), torch.enable_grad():
        steps = {form: make_step(form) for form in FORMS}
        images = torch.randn(BATCH, 3, 224, 224)
        torch.testing.assert_close(steps["idle"](images), steps["masked"](images), rtol=1e-4, atol=1e-4)
        calls = {form: rotating(step, random_inputs(tuple(images.shape), images)) for form, step in steps.items()}
        return alternated_samples(calls, SECONDS)


@pytest.mark.parametrize("form", FORMS)
def test_train(benchmark: Any, replay: Callable[..., Timing], form: str) -> None:
    benchmark.group = f"training step, DeiT-S, keep ratio 0.7, batch {BATCH}"
    benchmark.name = form
    replay(comparison()[form], torch.device("cpu"))
