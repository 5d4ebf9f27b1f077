"""Every op on every CPU backend against the float64 reference: values, layouts, gradients, compilation."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops import reference, testing
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import CASES, DTYPES, LARGE_CASES, OPS, Case, check, expected, make_arguments, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ("reference", "cpu")
IN_PLACE = tuple(op for op in OPS if RECORDS[op].in_place)
SCATTERING = ("scatter_tokens_", "scatter_add_tokens_")
FORWARD = tuple(op for op in OPS if RECORDS[op].derivative_of is None)
DIFFERENTIABLE = tuple(op for op in OPS if RECORDS[op].differentiable)
ON_CPU = tuple(op for op in OPS if "cpu" in RECORDS[op].kernels | RECORDS[op].composed)
# Matrix products and sums over rows, which libraries split by thread: rounding depends on the number of threads.
SPLIT = ("cls_direction", "gather_norm_backward", "token_cut_loss", "token_cut_loss_backward")
SMALL = Case(2, 5, 4, 3, P=2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _declared(request: pytest.FixtureRequest) -> None:
    """Skips an op on a backend that it is declared not to run on."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and parameters.params.get("backend") == "cpu":
        op = parameters.params.get("op")
        if op is not None and op not in ON_CPU:
            pytest.skip(f"{op} is declared to have no kernel on cpu")


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def copy(arguments: tuple) -> tuple:
    """The same values in the same layout, in memory of their own (in-place ops write to their arguments)."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, Tensor) else a
        for a in arguments
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def with_grad(arguments: tuple) -> tuple:
    return tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def op_with_grad(op: str, case: Case) -> tuple:
    """Arguments that all take a gradient; scores do not: selection has none."""
    arguments = list(with_grad(make_arguments(op, case)))
    if op == "select_gather_norm":
        arguments[1] = arguments[1].detach()
    return tuple(arguments)


# Values


@each_case
@pytest.mark.parametrize("op", OPS)
def test_reference_backend(op: str, case: Case) -> None:
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "reference"), wanted, case.dtype)


@each_case
@pytest.mark.parametrize("op", ON_CPU)
def test_cpu_backend(op: str, case: Case, instruction_sets: Iterator[str], keep_threads: None) -> None:
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    for name in instruction_sets:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(op, copy(arguments), "cpu"))
            check(op, results[-1], wanted, case.dtype)
        one, two, again = results
        assert all(map(same_bits, two, again)), f"two equal calls differ ({name})"
        if op not in SPLIT:
            assert all(map(same_bits, one, two)), f"the number of threads changes the result ({name})"
        if "cpu" in RECORDS[op].composed:
            break  # the kernels that it is made of run on every instruction set under their own names


@each_backend
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_large(op: str, case: Case, backend: str) -> None:
    arguments = make_arguments(op, case)
    check(op, run(op, copy(arguments), backend), expected(op, arguments), case.dtype)


@pytest.mark.parametrize("op", ON_CPU)
def test_from_several_python_threads(op: str) -> None:
    arguments = make_arguments(op, CASES[0])
    wanted = run(op, copy(arguments), "cpu")
    found: list[list[Tensor]] = []

    def work() -> None:
        for _ in range(5):
            found.append(run(op, copy(arguments), "cpu"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    for result in found:
        if op in SPLIT:
            check(op, result, expected(op, arguments), CASES[0].dtype)
        else:
            assert all(map(same_bits, result, wanted))


@each_backend
@pytest.mark.parametrize(
    "op, positions",
    [
        ("token_scores", {"norm_weight": 2, "norm_bias": 3}),
        ("select_gather_norm", {"norm_weight": 4, "norm_bias": 5}),
        ("gather_add_norm", {"gamma": 3, "norm_weight": 5, "norm_bias": 6}),
        ("scatter_add_tokens", {"gamma": 4}),
        ("scatter_add_tokens_", {"gamma": 4}),
        ("gather_norm_backward", {"norm_weight": 3}),
    ],
)
def test_optional_parameters(op: str, positions: dict[str, int], backend: str) -> None:
    for dropped in (*([p] for p in positions.values()), positions.values()):  # each alone, then all together
        arguments = tuple(None if i in dropped else a for i, a in enumerate(make_arguments(op, CASES[1])))
        check(op, run(op, copy(arguments), backend), expected(op, arguments), CASES[1].dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_"])
def test_branch_of_another_dtype(op: str, dtype: torch.dtype, backend: str) -> None:
    """Autocast: a float32 residual stream, a branch of a half type, parameters of any."""
    arguments = [
        a.to(dtype) if isinstance(a, Tensor) and (i == (2 if op == "gather_add_norm" else 3) or a.dim() == 1) else a
        for i, a in enumerate(make_arguments(op, Case(2, 33, 40, 20)))
    ]
    wanted = expected(op, tuple(arguments))
    (*_, last) = actual = run(op, tuple(arguments), backend)
    assert last.dtype == torch.float32
    check(op, actual, wanted, torch.float32)


@each_backend
def test_layer_norm_of_rows_with_a_large_mean(backend: str) -> None:
    """A variance from E[x^2] - E[x]^2 would lose every digit here."""
    case = Case(2, 33, 384, 20)
    x = testing.make_tokens(case, torch.Generator().manual_seed(0)) + 1000
    indices = torch.arange(5).expand(2, -1)
    wanted = reference.gather_add_norm(x.double(), indices, x[:, :5].double() * 0, None, 1.0, None, None, 1e-6)[1]
    _, normed = ik.gather_add_norm(x, indices, x[:, :5] * 0, None, 1.0, None, None, 1e-6, backend=backend)
    plain = torch.nn.functional.layer_norm(x[:, :5], (384,), eps=1e-6)
    assert testing.error(normed, wanted) <= 4 * testing.error(plain, wanted) + 1e-5


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["scatter_tokens", "scatter_tokens_", "scatter_add_tokens", "scatter_add_tokens_"])
def test_idle_rows_keep_their_bits(op: str, dtype: torch.dtype, backend: str) -> None:
    """Also where arithmetic would change them: signalling NaN, -0, infinities, subnormals."""
    arguments = make_arguments(op, Case(3, 49, 33, 11, dtype=dtype))
    x, indices = arguments[:2]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x.view(bits).random_(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1)
    if backend == "reference":
        x[x.isnan()] = math.inf  # PyTorch's own scatter rewrites the payload of half types
    before = x.clone()
    (out,) = run(op, arguments, backend)
    idle = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, indices, False)
    assert torch.equal(out.view(bits)[idle], before.view(bits)[idle])
    assert not torch.equal(out.view(bits)[~idle], before.view(bits)[~idle])
    assert op.endswith("_") or torch.equal(x.view(bits), before.view(bits))


@each_backend
def test_a_row_of_nan_stays_alone(backend: str) -> None:
    x, direction, *norm = make_arguments("token_scores", CASES[0])
    wanted = ik.token_scores(x, direction, *norm, backend=backend)
    x[0, 3, 5], x[1, 7, 1] = math.nan, math.inf
    scores = ik.token_scores(x, direction, *norm, backend=backend)
    bad = torch.zeros_like(scores, dtype=torch.bool)
    bad[0, 3] = bad[1, 7] = True
    assert torch.equal(scores.isnan(), bad)
    assert torch.equal(scores[~bad], wanted[~bad])


@each_backend
def test_no_indices(backend: str) -> None:
    x, none = torch.randn(2, 5, 8), torch.empty(2, 0, dtype=torch.int64)
    empty = torch.empty(2, 0, 8)
    assert ik.gather_tokens(x, none, backend=backend).shape == (2, 0, 8)
    assert torch.equal(ik.scatter_tokens(x, none, empty, backend=backend), x)
    assert torch.equal(ik.scatter_tokens_(x.clone(), none, empty, backend=backend), x)
    assert torch.equal(ik.expand_tokens(empty, none, 5, backend=backend), torch.zeros(2, 5, 8))
    assert all(t.shape == (2, 0, 8) for t in ik.gather_add_norm(x, none, empty, None, 1.0, None, None, 1e-6))


# Selection


def plain_selection(scores: list[float], num_keep: int, num_prefix_tokens: int) -> list[int]:
    image = range(num_prefix_tokens, len(scores))
    best = sorted(image, key=lambda j: (math.isnan(scores[j]), 0 if math.isnan(scores[j]) else -scores[j], j))
    return [*range(num_prefix_tokens), *sorted(best[:num_keep])]


@each_backend
@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    scores=st.lists(
        st.lists(
            st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4e38])
            | st.floats(width=32),
            min_size=6,
            max_size=6,
        )
        | st.lists(st.floats(width=32), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
)
def test_selection_is_a_plain_sort(backend: str, data: st.DataObject, scores: list[list[float]]) -> None:
    num_prefix_tokens = data.draw(st.integers(0, 5))
    num_keep = data.draw(st.integers(1, 6 - num_prefix_tokens))
    wanted = [plain_selection(row, num_keep, num_prefix_tokens) for row in scores]
    for dtype in (torch.float32, torch.float64):
        found = ik.select_tokens(torch.tensor(scores, dtype=dtype), num_keep, num_prefix_tokens, backend=backend)
        assert found.tolist() == wanted


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 7, 64, 197, 577, 1370])
def test_selection_of_many_tokens(T: int, dtype: torch.dtype, backend: str) -> None:
    """Long rows with many ties (half types have few values), every kind of K."""
    scores = torch.randn(3, T).to(dtype)
    scores[:, ::5], scores[1, ::3] = 0.0, math.nan
    scores[2, ::7] = -0.0
    for num_prefix_tokens in {0, min(1, T - 1), min(5, T - 1)}:
        N = T - num_prefix_tokens
        for num_keep in {1, (N + 1) // 2, N}:
            found = ik.select_tokens(scores, num_keep, num_prefix_tokens, backend=backend)
            wanted = [plain_selection(row, num_keep, num_prefix_tokens) for row in scores.tolist()]
            assert found.dtype == torch.int64 and found.tolist() == wanted


@each_backend
def test_prefix_scores_are_not_read(backend: str) -> None:
    scores = torch.tensor([[math.inf, math.nan, 0.0, 3.0, 1.0, 2.0]])
    assert ik.select_tokens(scores, 2, 2, backend=backend).tolist() == [[0, 1, 3, 5]]
    assert ik.select_tokens(torch.full((1, 4), math.nan), 2, 1, backend=backend).tolist() == [[0, 1, 2]]


@each_backend
def test_scores_that_would_be_rounded_are_refused(backend: str) -> None:
    """Rounding float64 scores to the accumulate type of x would select other tokens than ``select_tokens`` does."""
    scores = 1 + torch.arange(8, dtype=torch.float64).expand(2, -1) * 1e-12
    with pytest.raises(TypeError, match="^select_gather_norm: scores must be .*got float64"):
        ik.select_gather_norm(torch.randn(2, 8, 16), scores, 3, 1, None, None, 1e-6, backend=backend)
    assert ik.select_tokens(scores, 3, 1, backend=backend).tolist() == [[0, 5, 6, 7]] * 2


# Memory layouts


def offset(t: Tensor) -> Tensor:
    base = t.new_zeros([s + 5 for s in t.shape])
    return base[tuple(slice(2, s + 2) for s in t.shape)].copy_(t)


def strided(t: Tensor) -> Tensor:
    """Every second element along every axis."""
    base = t.new_zeros([2 * s for s in t.shape])
    return base[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def transposed(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def skipping(t: Tensor) -> Tensor:
    """Contiguous channels, tokens and images apart: the layout that the kernels take without a copy."""
    if not t.dim():
        return t
    base = t.new_zeros([*(3 * s + 1 for s in t.shape[:-1]), t.shape[-1] + 3])
    return base[(*(slice(1, None, 3) for _ in t.shape[:-1]), slice(1, t.shape[-1] + 1))].copy_(t)


LAYOUTS = (offset, strided, transposed, skipping)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_layouts_of_every_argument(op: str, dtype: torch.dtype, layout, backend: str) -> None:
    case = Case(3, 20, 17, 7, P=2, dtype=dtype)
    plain = make_arguments(op, case)
    wanted = expected(op, plain)
    tensors = [i for i, a in enumerate(plain) if isinstance(a, Tensor)]
    for chosen in (*([i] for i in tensors), tensors):  # each alone, then all together
        arguments = tuple(layout(a) if i in chosen else a for i, a in enumerate(copy(plain)))
        assert all(torch.equal(a, b) for a, b in zip(arguments, plain, strict=True) if isinstance(a, Tensor))
        check(op, run(op, arguments, backend), wanted, dtype)


@each_backend
@pytest.mark.parametrize("op", [op for op in OPS if op not in IN_PLACE])
def test_expanded_arguments(op: str, backend: str) -> None:
    """Stride 0 in every axis but the last of every tensor."""
    case = Case(3, 20, 17, 7, P=2)
    arguments = tuple(
        a[:1].expand_as(a) if isinstance(a, Tensor) and a.dim() > 1 else a for a in make_arguments(op, case)
    )
    check(op, run(op, arguments, backend), expected(op, arguments), case.dtype)
    if op == "token_cut_loss_backward":
        return  # its saved sums belong to these tokens
    arguments = tuple(a[:, :1].expand_as(a) if isinstance(a, Tensor) and a.dim() == 3 else a for a in arguments)
    check(op, run(op, arguments, backend), expected(op, arguments), case.dtype)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_writes_its_view_only(op: str, layout, backend: str) -> None:
    x, indices, *rest = make_arguments(op, Case(3, 20, 17, 7, P=2))
    (wanted,) = expected(op, (x, indices, *rest))
    view = layout(x)
    base = view._base if view._base is not None else view
    outside = torch.ones_like(base, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    base[outside] = 12345.0
    result = getattr(ik, op)(view, indices, *rest, backend=backend)
    assert result.data_ptr() == view.data_ptr() and result.stride() == view.stride()
    check(op, [view], [wanted], torch.float32)
    assert (base[outside] == 12345.0).all()


BAD_INDICES = {
    "negative": [-1, 2, 3],
    "too large": [0, 2, 21],
    "far too large": [0, 2, 2**62],
    "descending": [0, 3, 2],
    "twice": [0, 2, 2],
    "wrapped": [5, -(2**63), 2],
}


@each_backend
@pytest.mark.parametrize("bad", BAD_INDICES.values(), ids=BAD_INDICES)
@pytest.mark.parametrize(
    "op",
    [
        "gather_tokens",
        "expand_tokens",
        "gather_add_norm",
        "scatter_tokens",
        "scatter_add_tokens",
        "token_cut_loss",
        *SCATTERING,
    ],
)
def test_bad_indices_raise_and_write_nothing(op: str, bad: list[int], backend: str) -> None:
    arguments = copy(make_arguments(op, Case(3, 20, 17, 2)))
    (indices,) = (a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.int64)
    indices[2] = torch.tensor(bad)  # the last image, when all others are done
    before = copy(arguments)
    with pytest.raises(ValueError, match=rf"^{op}: indices must be strictly ascending.*inside \[0, 21\).*got"):
        run(op, arguments, backend)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor))


@each_backend
@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_on_shared_memory_raises(op: str, backend: str) -> None:
    x, *rest = make_arguments(op, Case(3, 20, 17, 7))
    with pytest.raises(ValueError, match=f"^{op}: x must be a tensor whose elements do not share memory"):
        getattr(ik, op)(x[:1].expand_as(x), *rest, backend=backend)


@each_backend
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("op", SCATTERING)
def test_in_place_from_its_own_rows_is_right_or_refused(op: str, B: int, backend: str) -> None:
    x, indices, tokens, *rest = make_arguments(op, Case(B, 40, 64, 12))
    (wanted,) = expected(op, (x, indices, x[:, 5:18].clone(), *rest))
    try:
        run(op, (x, indices, x[:, 5:18], *rest), backend)
    except (RuntimeError, ValueError) as error:
        assert "overlap" in str(error) or "memory" in str(error)
    else:
        check(op, [x], [wanted], torch.float32)


# torch.library


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(2, 9, 6, 4, P=2, dtype=dtype)
    arguments = op_with_grad(op, case) if op in DIFFERENTIABLE and dtype == torch.float32 else make_arguments(op, case)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op == "select_gather_norm" and arguments[0].requires_grad:
        tests.pop()  # it adds up all outputs and cannot add floats to indices; test_compiled_gradients does the same
    torch.library.opcheck(getattr(torch.ops.idlevit, op).default, arguments, {"backend": backend}, test_utils=tests)


@each_backend
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str, backend: str) -> None:
    arguments = op_with_grad(op, SMALL)

    def function(*a):
        result = getattr(ik, op)(*a, backend=backend)
        return result[1] if op == "select_gather_norm" else result

    assert torch.autograd.gradcheck(function, arguments)


@each_backend
@pytest.mark.parametrize("op", IN_PLACE)
def test_gradcheck_in_place(op: str, backend: str) -> None:
    x, *rest = with_grad(make_arguments(op, SMALL))
    assert torch.autograd.gradcheck(lambda x, *a: getattr(ik, op)(x * 1, *a, backend=backend), (x, *rest))


@each_backend
@pytest.mark.parametrize("op", ["gather_tokens", "scatter_tokens", "expand_tokens"])
def test_gradgradcheck(op: str, backend: str) -> None:
    arguments = op_with_grad(op, SMALL)
    assert torch.autograd.gradgradcheck(lambda *a: getattr(ik, op)(*a, backend=backend) ** 3, arguments)


@each_backend
@pytest.mark.parametrize("op", ["select_gather_norm", "token_cut_loss"])
def test_second_backward_is_refused(op: str, backend: str) -> None:
    arguments = op_with_grad(op, SMALL)
    result = getattr(ik, op)(*arguments, backend=backend)
    result = result[1] if op == "select_gather_norm" else result
    leaf = next(a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad)
    (grad,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: it is differentiable once"):
        grad.sum().backward()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_narrow_types(op: str, dtype: torch.dtype, backend: str) -> None:
    """Against autograd through the float64 reference; gradients have the dtype of what they belong to."""
    arguments = op_with_grad(op, Case(2, 49, 33, 11, P=2, dtype=dtype))
    wide = with_grad(tuple(a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a
                           for a in arguments))  # fmt: skip
    leaves = [(a, w) for a, w in zip(arguments, wide, strict=True) if isinstance(a, Tensor) and a.requires_grad]

    def outputs(function, args) -> list[Tensor]:
        result = function(*args)
        return [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]

    actual = outputs(lambda *a: getattr(ik, op)(*a, backend=backend), arguments)
    wanted = outputs(getattr(reference, op), wide)[: len(actual)]
    weights = [torch.randn_like(w).to(dtype) for w in wanted]
    grads = torch.autograd.grad(actual, [a for a, _ in leaves], [g.to(a.dtype) for g, a in zip(weights, actual)])  # noqa: B905
    wanted_grads = torch.autograd.grad(wanted, [w for _, w in leaves], [g.double() for g in weights])
    limit = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for grad, want, (leaf, _) in zip(grads, wanted_grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert testing.error(grad, want) <= limit


@each_backend
def test_a_gradient_that_nobody_asked_for_is_none(backend: str) -> None:
    x, indices, tokens = make_arguments("scatter_tokens", SMALL)
    tokens.requires_grad_()
    ik.scatter_tokens(x, indices, tokens, backend=backend).sum().backward()
    assert x.grad is None and torch.equal(tokens.grad, torch.ones_like(tokens))
    assert not ik.select_tokens(torch.randn(2, 5, requires_grad=True), 2, backend=backend).requires_grad


@each_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", FORWARD)
def test_compile(op: str, dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: getattr(ik, op)(*a, backend=backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for case in (Case(2, 19, 17, 7, P=2), *([Case(3, 40, 17, 12, P=2)] if dynamic else [])):
        arguments = make_arguments(op, case)
        wanted = run(op, copy(arguments), backend)
        result = compiled(*arguments)
        found = [arguments[0]] if op in IN_PLACE else list(result) if isinstance(result, tuple) else [result]
        assert all(map(same_bits, found, wanted))


@each_backend
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_gradients(op: str, backend: str) -> None:
    torch._dynamo.reset()

    def loss(*a) -> Tensor:
        result = getattr(ik, op)(*a, backend=backend)
        return sum(t.pow(2).sum() for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in (Case(2, 19, 17, 7, P=2), Case(3, 40, 24, 12, P=2)):
        arguments = op_with_grad(op, case)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        wanted = torch.autograd.grad(loss(*arguments), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*arguments), leaves), wanted)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    """The whole chain with arithmetic around it, forward and backward, by the default compiler."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    x, direction, *norm = op_with_grad("token_scores", Case(2, 49, 32, 11))
    gamma = torch.randn(32, requires_grad=True)

    def chain(x: Tensor) -> Tensor:
        scores = ik.token_scores(x.relu(), direction, *norm)
        indices, y = ik.select_gather_norm(x, scores, 11, 1, *norm)
        tokens, y = ik.gather_add_norm(x, indices, y.sin(), gamma, 0.5, *norm)
        return ik.scatter_add_tokens(x, indices, tokens, y.cos(), gamma, 0.5) * 2

    leaves = [x, *norm[:2], gamma]
    wanted, found = chain(x), torch.compile(chain, fullgraph=True)(x)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.pow(2).sum(), leaves), torch.autograd.grad(wanted.pow(2).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_op_is_here() -> None:
    """An op that is added must get its cases in ``testing``."""
    ops = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("idlevit::")}  # fmt: skip
    assert ops == set(OPS)
