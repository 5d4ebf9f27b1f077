"""The CUDA backend: what it refuses and why, and, on a GPU, every op against the float64 reference.

Small sizes alone, so that ``compute-sanitizer --tool memcheck`` (and racecheck, synccheck, initcheck) can run
``pytest -m gpu -k "not large" tests/test_cuda.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.backends import cuda, native
from idlevit_kernels.testing import CASES, DTYPES, LARGE_CASES, OPS, Case, check, expected, make_arguments, run

REASONS = cuda.installed()
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS)),
    pytest.mark.usefixtures("poisoned_memory"),
]
KERNELS = [
    op for op in OPS if op not in ("cls_direction", "gather_norm_backward", "token_cut_loss", "token_cut_loss_backward")
]


def gpu(function: Callable) -> Callable:
    for mark in on_gpu:
        function = mark(function)
    return function


def test_cpu_tensors_are_refused_with_every_reason() -> None:
    with pytest.raises(ik.BackendError) as error:
        ik.gather_tokens(torch.zeros(1, 3, 8), torch.zeros(1, 1, dtype=torch.int64), backend="cuda")
    reasons = error.value.reasons["cuda"]
    assert "it runs on CUDA tensors, and one is on cpu" in reasons
    assert reasons[: len(REASONS)] == REASONS


def test_all_reasons_at_once() -> None:
    reasons = cuda.reasons("no_such_op", (torch.zeros(1, 3, 8, dtype=torch.int32),))
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
    ops = cuda.CUDAOps()
    monkeypatch.setattr(ops, "installed", list)
    monkeypatch.setattr(ops, "device_type", "cpu")
    monkeypatch.setattr(ops, "device_reasons", lambda device: ["the architecture"])
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
    ops = cuda.CUDAOps()

    def call(kernel: str, x: Tensor, *args: object) -> str | None:
        return getattr(native.extension(), "cuda_" + kernel)(*args, 0, 0)

    monkeypatch.setattr(ops, "call", call)
    getattr(ops, op)(*make_arguments(op, Case(0, 9, 8, 3)))  # nothing to launch
    with pytest.raises(RuntimeError, match=f"{op}: the CUDA kernel could not be launched: .*CUDA"):
        getattr(ops, op)(*make_arguments(op, Case(2, 9, 8, 3)))


WIDTHS = [
    Case(2, 9, C, 5, dtype=dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for C in (8, 504, 512, 768, 1024, 1280, 4096)
]


@gpu
@pytest.mark.parametrize("case", CASES + WIDTHS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_against_reference(op: str, case: Case) -> None:
    arguments = make_arguments(op, case, device="cuda")
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "cuda"), wanted, case.dtype)


@gpu
@pytest.mark.parametrize(
    "case",
    [
        *LARGE_CASES,
        Case(64, 196, 768, 137, dtype=torch.bfloat16),
        Case(1200, 400, 8, 300, scores="ties"),  # more kept tokens than one block takes
        Case(70000, 49, 8, 34),  # more images than the second dimension of a grid
    ],
    ids=str,
)
@pytest.mark.parametrize("op", KERNELS)
def test_large(op: str, case: Case) -> None:
    arguments = make_arguments(op, case, device="cuda")
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "cuda"), wanted, case.dtype)


@gpu
@pytest.mark.parametrize("op", KERNELS)
def test_same_bits_from_run_to_run(op: str) -> None:
    results = [run(op, make_arguments(op, CASES[0], device="cuda"), "cuda") for _ in range(2)]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", KERNELS)
def test_captured_in_a_graph(op: str, dtype: torch.dtype) -> None:
    """A replay computes from what the captured arguments hold by then."""
    case = Case(2, 49, 64, 20, dtype=dtype)
    arguments = make_arguments(op, case, device="cuda")
    fresh = make_arguments(op, case, seed=1, device="cuda")
    wanted = expected(op, fresh)
    run(op, make_arguments(op, case, device="cuda"), "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(op, arguments, "cuda")
    for captured, new in zip(arguments, fresh, strict=True):
        if isinstance(captured, Tensor):
            captured.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    check(op, results, wanted, dtype)


@gpu
@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_current_stream(op: str) -> None:
    """Work that the stream still has to do comes first: on another stream the op would read what was there before."""
    case = Case(2, 49, 64, 20)
    arguments, fresh = make_arguments(op, case, device="cuda"), make_arguments(op, case, seed=1, device="cuda")
    wanted = expected(op, fresh)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(arguments, fresh, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
        results = run(op, arguments, "cuda")
    stream.synchronize()
    check(op, results, wanted, case.dtype)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", KERNELS)
def test_runs_on_the_device_of_its_tensors(op: str) -> None:
    arguments = make_arguments(op, CASES[0], device="cuda:1")
    wanted = expected(op, arguments)
    assert torch.cuda.current_device() == 0
    results = run(op, arguments, "cuda")
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda", 1) for result in results)
    check(op, results, wanted, CASES[0].dtype)


@gpu
def test_gradients() -> None:
    case = Case(2, 9, 6, 4, P=2, dtype=torch.float64)
    for op in ("token_scores", "select_gather_norm", "gather_tokens", "gather_add_norm", "scatter_add_tokens"):
        arguments = [
            a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in make_arguments(op, case, device="cuda")
        ]
        if op == "select_gather_norm":
            arguments[1] = arguments[1].detach()

        def function(*a: object, op: str = op) -> object:
            result = getattr(ik, op)(*a, backend="cuda")
            return result[1] if op == "select_gather_norm" else result

        assert torch.autograd.gradcheck(function, arguments)
