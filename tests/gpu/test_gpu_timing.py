from __future__ import annotations

import pytest
import torch

from idlevit_kernels.block import timing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU")
def test_a_gpu_is_timed_to_the_end_of_its_work() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "two": lambda: x @ x @ x}
    timings = timing.alternate(calls, 0.5, device="cuda")
    assert 1e-4 < timings["one"].median and 1.5 < timings["two"].median / timings["one"].median < 2.5
