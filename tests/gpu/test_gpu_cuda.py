"""The CUDA C++ kernels on a GPU: every op, dtype and case against the float64 reference, streams, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops.backends import CUDA
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import CASES, DTYPES, LARGE_CASES, Case, check, expected, make_arguments, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU"),
    pytest.mark.usefixtures("built", "poisoned_memory"),
]
OPS = [op.name for op in RECORDS.values() if "cuda" in op.kernels | op.composed]
KERNELS = [op for op in OPS if "cuda" in RECORDS[op].kernels]

WIDTHS = [
    Case(2, 9, C, 5, dtype=dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for C in (8, 504, 512, 768, 1024, 1280, 4096)
]


@pytest.fixture
def built() -> None:
    reasons = CUDA.installed()
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("case", CASES + WIDTHS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_against_reference(op: str, case: Case) -> None:
    arguments = make_arguments(op, case, device="cuda")
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "cuda"), wanted, case.dtype)


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


@pytest.mark.parametrize("op", KERNELS)
def test_same_bits_from_run_to_run(op: str) -> None:
    results = [run(op, make_arguments(op, CASES[0], device="cuda"), "cuda") for _ in range(2)]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


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


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("op", ["gather_tokens", "gather_add_norm", "scatter_tokens_", "scatter_add_tokens_"])
def test_a_wrong_index_acts_as_the_nearest_valid_one(op: str, bad: int) -> None:
    x, indices, *rest = make_arguments(op, Case(1, 9, 8, 3, P=0), device="cuda")
    indices = torch.tensor([[2, 4, bad]], device="cuda")
    wanted = expected(op, (x.clone(), indices.clamp(0, 8), *rest))
    check(op, run(op, (x, indices, *rest), "cuda"), wanted, torch.float32)
