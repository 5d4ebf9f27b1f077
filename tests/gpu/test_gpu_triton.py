"""The Triton kernels on a GPU: every op, dtype and case against the float64 reference, gradients, CUDA graphs.

Run with ``pytest -m gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops import reference, testing
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import CASES, DTYPES, LARGE_CASES, Case, check, expected, make_arguments, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU"),
    pytest.mark.usefixtures("poisoned_memory", "full_precision"),
]

OPS = tuple(op.name for op in RECORDS.values() if "triton" in op.kernels | op.composed)
IN_PLACE = tuple(op for op in OPS if RECORDS[op].in_place)
DIFFERENTIABLE = tuple(op for op in OPS if RECORDS[op].differentiable)
REFUSED = "token_cut_loss_backward", torch.float64
# Enough tokens that a program walks several tiles.
BATCH = Case(256, 196, 384, 137, dtype=torch.bfloat16)


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def copy(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
        if isinstance(a, Tensor)
        else a
        for a in arguments
    )


def with_grad(op: str, case: Case) -> tuple[Any, ...]:
    arguments = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in make_arguments(op, case, device="cuda")
    ]
    if op == "select_gather_norm":
        arguments[1] = arguments[1].detach()  # selection has no gradient
    return tuple(arguments)


def allowed(op: str, dtype: torch.dtype) -> bool:
    """Whether Triton has a kernel; where it has none, a call by name must say why."""
    if (op, dtype) == REFUSED:
        with pytest.raises(ik.BackendError, match="float64 matrices"):
            run(op, make_arguments(op, Case(1, 9, 8, 3, dtype=dtype), device="cuda"), "triton")
    return (op, dtype) != REFUSED


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, case: Case) -> None:
    if not allowed(op, case.dtype):
        return
    arguments = make_arguments(op, case, device="cuda")
    wanted = expected(op, arguments)
    results = [run(op, copy(arguments), "triton") for _ in range(2)]
    check(op, results[0], wanted, case.dtype)
    if op != "cls_direction":  # cuBLAS may choose anew
        assert all(map(torch.equal, *results)), "two equal calls differ"


@pytest.mark.parametrize("op", OPS)
def test_large_batch(op: str) -> None:
    arguments = make_arguments(op, BATCH, device="cuda")
    found = run(op, copy(arguments), "triton")
    for a, w in zip(found, run(op, copy(arguments), "reference"), strict=True):
        if a.is_floating_point():
            # Both sides round: this looks for wrong rows, not for the last bit.
            assert testing.error(a, w) <= 4 * testing.TOLERANCES[op, BATCH.dtype] + 1e-4
        else:
            assert torch.equal(a, w)


@pytest.mark.parametrize("scores", ["random", "ties", "special", "equal"])
@pytest.mark.parametrize("N", [1, 49, 196, 576, 1369, 4096, 16384])
def test_selection(N: int, scores: str) -> None:
    values = testing.make_scores(Case(5, N, 8, 1, P=0, scores=scores), torch.Generator().manual_seed(N), "cuda")
    for num_keep in {1, (N + 1) // 2, N}:
        (wanted,) = expected("select_tokens", (values, num_keep, 0))
        assert torch.equal(ik.select_tokens(values, num_keep, 0, backend="triton").cpu(), wanted)


@pytest.mark.parametrize(
    ("op", "dtype"), [(op, dtype) for op in DIFFERENTIABLE for dtype in DTYPES if (f"{op}_backward", dtype) != REFUSED]
)
def test_gradients(op: str, dtype: torch.dtype) -> None:
    """Against autograd through the float64 reference."""
    arguments = with_grad(op, Case(2, 49, 33, 11, P=2, dtype=dtype))
    wide = tuple(
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    )
    leaves = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def outputs(result: Any) -> list[Tensor]:
        return [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]

    actual = outputs(getattr(ik, op)(*arguments, backend="triton"))
    wanted = outputs(getattr(reference, op)(*wide))[: len(actual)]
    weights = [torch.randn_like(a) for a in actual]
    grads = torch.autograd.grad(actual, [arguments[i] for i in leaves], weights)
    wanted_grads = torch.autograd.grad(wanted, [wide[i] for i in leaves], [w.double() for w in weights])
    limit = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert testing.error(grad, want) <= limit


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    case = Case(2, 9, 6, 4, P=2)
    arguments = with_grad(op, case) if op in DIFFERENTIABLE else make_arguments(op, case, device="cuda")
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op == "select_gather_norm":
        tests.pop()  # it adds up all outputs and cannot add floats to indices
    torch.library.opcheck(getattr(torch.ops.idlevit, op).default, arguments, {"backend": "triton"}, test_utils=tests)


@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op: str) -> None:
    """Captured once and replayed on other values: no launch depends on the host, and nothing waits for the device."""
    torch.use_deterministic_algorithms(False)  # filling new memory is part of the poisoning and not of the op
    case = Case(4, 196, 384, 137, dtype=torch.float16)
    first, second = (make_arguments(op, case, seed=seed, device="cuda") for seed in (0, 1))
    wanted = run(op, copy(second), "triton")
    static = copy(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, copy(static), "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(op, static, "triton")
    for target, source in zip(static, second, strict=True):
        if isinstance(target, Tensor):
            target.copy_(source)
    graph.replay()
    check(op, result, [w.cpu() for w in wanted], case.dtype)


@pytest.mark.parametrize("op", OPS)
def test_no_host_synchronisation(op: str) -> None:
    arguments = make_arguments(op, Case(2, 49, 64, 20), device="cuda")
    run(op, copy(arguments), "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, copy(arguments), "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts() -> None:
    arguments = make_arguments("token_scores", Case(2, 49, 64, 20), device="cuda:1")
    with torch.cuda.device(0):
        found = run("token_scores", arguments, "triton")
    check("token_scores", found, expected("token_scores", arguments), torch.float32)


@pytest.mark.parametrize("autotune", ["0", "1"])
def test_autotuning_changes_rounding_only(autotune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDLEVIT_AUTOTUNE", autotune)
    for op in ("token_cut_loss", "token_cut_loss_backward"):
        arguments = make_arguments(op, Case(2, 196, 384, 137, dtype=torch.bfloat16), device="cuda")
        check(op, run(op, arguments, "triton"), expected(op, arguments), torch.bfloat16)


def test_tf32_cut_loss() -> None:
    """Operands lose 13 bits, 2^-10 of their size where they are truncated; the accumulation is float32 as ever."""
    case = Case(2, 196, 384, 137)
    torch.set_float32_matmul_precision("high")
    for op in ("token_cut_loss", "token_cut_loss_backward"):
        arguments = make_arguments(op, case, device="cuda")
        for found, wanted in zip(run(op, arguments, "triton"), expected(op, arguments), strict=True):
            assert testing.error(found, wanted) <= 4 * 2.0**-10


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("op", ["gather_tokens", "gather_add_norm", "scatter_tokens_", "scatter_add_tokens_"])
def test_a_wrong_index_acts_as_the_nearest_valid_one(op: str, bad: int) -> None:
    x, indices, *rest = make_arguments(op, Case(1, 9, 8, 3, P=0), device="cuda")
    indices = torch.tensor([[2, 4, bad]], device="cuda")
    wanted = expected(op, (x.clone(), indices.clamp(0, 8), *rest))
    check(op, run(op, (x, indices, *rest), "triton"), wanted, torch.float32)


def test_float64_gradients_of_the_cut_loss() -> None:
    """Triton has no kernel for these: "auto" falls back."""
    q, k, *others = make_arguments("token_cut_loss", Case(2, 20, 33, 7, dtype=torch.float64), device="cuda")
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    grads = torch.autograd.grad(ik.token_cut_loss(*leaves, *others), leaves)
    wanted = torch.autograd.grad(reference.token_cut_loss(*leaves, *others)[0], leaves)
    for grad, want in zip(grads, wanted, strict=True):
        assert testing.error(grad, want) <= 1e-12


def test_auto_chooses_triton() -> None:
    from idlevit_kernels.ops import backends

    for op in OPS:
        arguments = make_arguments(op, Case(2, 9, 6, 4), device="cuda")
        assert backends.kernel(op, "auto", arguments) is backends.named("triton").kernel(op)
