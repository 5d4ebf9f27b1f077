"""The CUDA backend without a GPU: what it refuses and why. On one: gpu/test_gpu_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops.backends import CUDA, cuda, native
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import Case, make_arguments

REASONS = CUDA.installed()
KERNELS = [op.name for op in RECORDS.values() if "cuda" in op.kernels]


def test_cpu_tensors_are_refused_with_every_reason() -> None:
    with pytest.raises(ik.BackendError) as error:
        ik.gather_tokens(torch.zeros(1, 3, 8), torch.zeros(1, 1, dtype=torch.int64), backend="cuda")
    reasons = error.value.reasons["cuda"]
    assert "it runs on CUDA tensors, and one is on cpu" in reasons
    assert reasons[: len(REASONS)] == REASONS


def test_all_reasons_at_once() -> None:
    reasons = CUDA.reasons("no_such_op", (torch.zeros(1, 3, 8, dtype=torch.int32),))
    assert "it has no kernel for no_such_op" in reasons
    assert "it knows float32, float64, float16 and bfloat16, not torch.int32" in reasons


def test_a_build_without_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutCUDA:
        cuda_built = False

    monkeypatch.setattr(native, "extension", lambda: WithoutCUDA)
    monkeypatch.setattr(cuda, "build_info", lambda: {"cuda_reason": "nvcc was not found"})
    assert "the native extension is built without CUDA: nvcc was not found" in cuda._installed.__wrapped__()


def test_too_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a machine that could run it."""
    ops = cuda.CUDABackend()
    monkeypatch.setattr(ops, "installed", list)
    monkeypatch.setattr(ops, "device_types", None)
    monkeypatch.setattr(ops, "architecture_reasons", lambda device: ["the architecture"])
    ops.__dict__["max_channels"] = 4096
    assert ops.reasons("gather_tokens", (torch.zeros(1, 1, 4097),)) == ["the architecture"], "it walks a row in parts"
    assert ops.reasons("token_scores", (torch.zeros(1, 1, 4096),)) == ["the architecture"]
    assert ops.reasons("token_scores", (torch.zeros(1, 1, 4097),)) == [
        "the architecture",
        "it takes at most 4096 channels, not 4097",
    ]


@pytest.mark.skipif(
    native.extension() is None or not native.extension().cuda_built or torch.cuda.is_available(),
    reason="needs an extension with CUDA and a machine without a GPU",
)
@pytest.mark.parametrize("op", KERNELS)
def test_without_a_device_the_launch_says_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding takes what the adapter passes, and the error of the runtime comes through."""
    ops = cuda.CUDABackend()

    def call(kernel: str, x: Tensor, *args: object) -> str | None:
        return getattr(native.extension(), "cuda_" + kernel)(*args, 0, 0)

    monkeypatch.setattr(ops, "call", call)
    getattr(ops, op)(*make_arguments(op, Case(0, 9, 8, 3)))  # nothing to launch
    with pytest.raises(RuntimeError, match=f"{op}: the CUDA kernel could not be launched: .*CUDA"):
        getattr(ops, op)(*make_arguments(op, Case(2, 9, 8, 3)))
