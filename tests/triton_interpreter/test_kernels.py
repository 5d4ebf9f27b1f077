"""Every Triton kernel, interpreted on the CPU, against the float64 reference. Sizes are small: programs take 10 ms."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops import testing
from idlevit_kernels.ops.backends import triton as backend
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import DTYPES, TOLERANCES, Case, error, expected, make_arguments, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROW_MODULES = ("score", "select", "gather", "scatter", "norm_backward")
OPS = tuple(op.name for op in RECORDS.values() if "triton" in op.kernels | op.composed)
IN_PLACE = tuple(op for op in OPS if RECORDS[op].in_place)
DIFFERENTIABLE = tuple(op for op in OPS if RECORDS[op].differentiable)
SMALL = Case(2, 9, 6, 4, P=2, dtype=torch.float64)


def module(name: str) -> Any:
    return sys.modules[f"{backend.__name__}.{name}"]


def cases(dtype: torch.dtype) -> list[Case]:
    return [
        Case(1, 196, 48, 137, dtype=dtype),
        Case(3, 49, 33, 7, P=2, dtype=dtype, layout="offset", scores="ties"),
        Case(2, 16, 40, 16, P=0, dtype=dtype, layout="transposed", scores="special"),  # K = N
        Case(1, 1, 8, 1, dtype=dtype),  # N = 1
        Case(0, 10, 8, 3, dtype=dtype),  # B = 0
        Case(2, 21, 3, 1, P=5, dtype=dtype, scores="equal"),  # K = 1
        Case(1, 9, 1000, 4, dtype=dtype, scores="special"),  # a row or two a tile
    ]


def check(op: str, actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """``testing.check``, but the interpreter truncates to bfloat16 where a GPU rounds: that is twice the roundoff."""
    assert len(actual) == len(wanted)
    for a, w in zip(actual, wanted, strict=True):
        if w.is_floating_point():
            assert error(a, w) <= TOLERANCES[op, dtype] * (2 if dtype == torch.bfloat16 else 1)
        else:
            assert torch.equal(a, w)


def skip_bfloat16_product(op: str, dtype: torch.dtype) -> None:
    if op.startswith("token_cut_loss") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no product of bfloat16 matrices")


def copy(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def with_grad(op: str, case: Case) -> tuple[Any, ...]:
    arguments = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in make_arguments(op, case)
    ]
    if op == "select_gather_norm":
        arguments[1] = arguments[1].detach()  # selection has no gradient
    return tuple(arguments)


def test_the_kernels_are_interpreted() -> None:
    assert backend.interpreted() and not backend.TRITON.installed()


@pytest.mark.parametrize("case", [case for dtype in DTYPES for case in cases(dtype)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, case: Case) -> None:
    skip_bfloat16_product(op, case.dtype)
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "triton"), wanted, case.dtype)


@pytest.mark.parametrize("N, K", [(576, 192), (1369, 958)])
@pytest.mark.parametrize("op", OPS)
def test_long_images(op: str, N: int, K: int) -> None:
    if op == "token_cut_loss_backward" and N > 1000:
        pytest.skip("a quarter of a minute; the forward of this size and the backward of the other run")
    # Half precision has the larger tiles, hence fewer programs.
    case = Case(1, N, 16, K, dtype=torch.float16 if op.startswith("token_cut_loss") else torch.float32)
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "triton"), wanted, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", ["random", "ties", "special", "equal"])
@pytest.mark.parametrize("N", [49, 196, 576, 1369, 4096, 16384])
def test_selection(N: int, scores: str, dtype: torch.dtype) -> None:
    values = testing.make_scores(Case(2, N, 8, 1, scores=scores), torch.Generator().manual_seed(N)).to(dtype)
    for num_prefix_tokens, num_keep in ((0, 1), (1, (2 * N) // 3), (5, N - 4)):
        if num_prefix_tokens + num_keep <= N + 1 and N + 1 <= 16384:
            (wanted,) = expected("select_tokens", (values, num_keep, num_prefix_tokens))
            assert torch.equal(ik.select_tokens(values, num_keep, num_prefix_tokens, backend="triton"), wanted)


@pytest.mark.parametrize("op", [op for op in OPS if op != "select_tokens" and not op.startswith("token_cut_loss")])
def test_programs_that_walk_several_tiles(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a large batch does; all but the sums over rows come out with the same bits as one tile a program."""
    case = Case(2, 70, 130, 33)
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    once = run(op, copy(arguments), "triton")
    for name in ROW_MODULES:
        monkeypatch.setattr(
            module(name), "walk", lambda batch, rows, tile, programs: (3, batch * math.ceil(rows / (3 * tile)))
        )
    found = run(op, copy(arguments), "triton")
    check(op, found, wanted, case.dtype)
    assert all(map(torch.equal, found[:1], once[:1]))


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
def test_optional_parameters(op: str, positions: dict[str, int]) -> None:
    case = Case(2, 20, 33, 7)
    for dropped in (*([p] for p in positions.values()), positions.values()):  # each alone, then all together
        arguments = tuple(None if i in dropped else a for i, a in enumerate(make_arguments(op, case)))
        wanted = expected(op, arguments)
        check(op, run(op, arguments, "triton"), wanted, case.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_"])
def test_branch_of_a_half_type(op: str, dtype: torch.dtype) -> None:
    """Autocast: a float32 residual stream and a branch of a half type."""
    arguments = list(make_arguments(op, Case(2, 33, 40, 20)))
    position = 2 if op == "gather_add_norm" else 3
    arguments[position] = arguments[position].to(dtype)
    wanted = expected(op, tuple(arguments))
    check(op, run(op, tuple(arguments), "triton"), wanted, torch.float32)


@pytest.mark.parametrize("op", ["token_scores", "select_gather_norm", "gather_add_norm", "gather_norm_backward"])
def test_float32_parameters_of_half_tokens(op: str) -> None:
    case = Case(2, 33, 40, 20, dtype=torch.float16)
    arguments = tuple(a.float() if isinstance(a, Tensor) and a.dim() == 1 else a for a in make_arguments(op, case))
    wanted = expected(op, arguments)
    check(op, run(op, arguments, "triton"), wanted, case.dtype)


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("op", ["gather_tokens", "gather_add_norm", "scatter_tokens_", "scatter_add_tokens_"])
def test_a_wrong_index_acts_as_the_nearest_valid_one(op: str, bad: int) -> None:
    """In the middle of a larger tensor, whose other rows are neither read nor written."""
    x, indices, *rest = make_arguments(op, Case(1, 9, 8, 3, P=0))
    around = torch.full((3, 9, 8), torch.nan)
    around[1] = x[0]
    inside, indices = around[1:2], torch.tensor([[2, 4, bad]])
    wanted = expected(op, (inside.clone(), indices.clamp(0, 8), *rest))
    check(op, run(op, (inside, indices, *rest), "triton"), wanted, torch.float32)
    assert around[0].isnan().all() and around[2].isnan().all()


@pytest.mark.parametrize("wrong", [[5, 5, 5, 5], [8, 0, 5, 2], [-1, 0, 9, 2**40]])
@pytest.mark.parametrize("op", ["scatter_tokens", "scatter_add_tokens", "expand_tokens", "gather_norm_backward"])
def test_wrong_indices_read_no_row_past_the_last(op: str, wrong: list[int]) -> None:
    """What comes out is then a matter of the caller; that all of it is finite shows that nothing else was read."""
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in make_arguments(op, Case(1, 9, 8, 4, P=0))]
    position = 2 if op == "gather_norm_backward" else 1
    arguments[position] = torch.tensor([wrong])
    for i in (0, 2) if op in ("scatter_tokens", "scatter_add_tokens") else (0,):  # followed by NaN in memory
        whole = torch.full((2, *arguments[i].shape[1:]), torch.nan)
        whole[0] = arguments[i][0]
        arguments[i] = whole[:1]
    assert all(t.isfinite().all() for t in run(op, tuple(arguments), "triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["scatter_tokens", "scatter_tokens_", "scatter_add_tokens", "scatter_add_tokens_"])
def test_idle_rows_keep_their_bits(op: str, dtype: torch.dtype) -> None:
    """Also where arithmetic would change them: NaN of any payload, -0, infinities, subnormals."""
    arguments = make_arguments(op, Case(2, 20, 33, 7, dtype=dtype))
    x, indices = arguments[:2]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x.view(bits).random_(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1)
    before = x.clone()
    (out,) = run(op, arguments, "triton")
    idle = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, indices, False)
    assert torch.equal(out.view(bits)[idle], before.view(bits)[idle])


def test_layer_norm_of_rows_with_a_large_mean() -> None:
    """A variance from E[x^2] - E[x]^2 would lose every digit here."""
    x = torch.randn(1, 5, 384) + 1000
    indices = torch.arange(5).expand(1, -1)
    _, wanted = expected("gather_add_norm", (x, indices, x * 0, None, 1.0, None, None, 1e-6))
    _, found = ik.gather_add_norm(x, indices, x * 0, None, 1.0, None, None, 1e-6, backend="triton")
    plain = torch.nn.functional.layer_norm(x, (384,), eps=1e-6)
    assert error(found, wanted) <= 4 * error(plain, wanted) + 1e-5


def test_no_indices() -> None:
    x, none, empty = torch.randn(2, 5, 8), torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, 8)
    assert ik.gather_tokens(x, none, backend="triton").shape == (2, 0, 8)
    assert torch.equal(ik.scatter_tokens(x, none, empty, backend="triton"), x)
    assert torch.equal(ik.expand_tokens(empty, none, 5, backend="triton"), torch.zeros(2, 5, 8))


@pytest.mark.parametrize("kind", ["both", "inter", "intra", "none"])
def test_token_cut_loss_kinds(kind: str) -> None:
    q, k, indices, scale, num_prefix_tokens, _ = make_arguments("token_cut_loss", Case(2, 40, 24, 13, P=3))
    arguments = (q, k, indices, scale, num_prefix_tokens, kind)
    wanted = expected("token_cut_loss", arguments)
    check("token_cut_loss", run("token_cut_loss", arguments, "triton"), wanted, torch.float32)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("op", ["token_cut_loss", "token_cut_loss_backward"])
def test_token_cut_loss_tile_sizes(op: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = module("token_cut_loss")
    configs = kernels.FORWARD_CONFIGS if op == "token_cut_loss" else kernels.BACKWARD_CONFIGS
    if number >= len(configs):
        pytest.skip("the forward has fewer configurations")
    monkeypatch.setattr(kernels, "tuned", lambda key, candidates, run, device: candidates[number])
    case = Case(1, 150, 200, 60, P=2, dtype=torch.float16, layout="offset")
    arguments = make_arguments(op, case)
    check(op, run(op, arguments, "triton"), expected(op, arguments), case.dtype)


def test_token_cut_loss_with_large_logits() -> None:
    """Without the running maximum the exponentials overflow."""
    q, k, indices, _, num_prefix_tokens, kind = make_arguments("token_cut_loss", Case(1, 70, 16, 30))
    arguments = (q, k, indices, 30.0, num_prefix_tokens, kind)
    loss, lse, share = expected("token_cut_loss", arguments)
    found = run("token_cut_loss", arguments, "triton")
    torch.testing.assert_close(found, [loss.float(), lse.float(), share.float()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    case = Case(2, 9, 6, 4, P=2, dtype=dtype)
    arguments = with_grad(op, case) if op in DIFFERENTIABLE and dtype == torch.float32 else make_arguments(op, case)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op == "select_gather_norm":
        tests.pop()  # it adds up all outputs and cannot add floats to indices
    torch.library.opcheck(getattr(torch.ops.idlevit, op).default, arguments, {"backend": "triton"}, test_utils=tests)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str) -> None:
    def function(*arguments: Any) -> Any:
        result = getattr(ik, op)(*arguments, backend="triton")
        return result[1] if op == "select_gather_norm" else result

    assert torch.autograd.gradcheck(function, with_grad(op, SMALL), fast_mode=True)


@pytest.mark.parametrize("op", IN_PLACE)
def test_gradcheck_in_place(op: str) -> None:
    x, *rest = with_grad(op, SMALL)
    function = lambda x, *a: getattr(ik, op)(x * 1, *a, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *rest), fast_mode=True)


@pytest.mark.parametrize("op", ["gather_tokens", "scatter_tokens", "expand_tokens"])
def test_gradgradcheck(op: str) -> None:
    function = lambda *a: getattr(ik, op)(*a, backend="triton") ** 3  # noqa: E731
    assert torch.autograd.gradgradcheck(function, with_grad(op, SMALL), fast_mode=True)


def test_results_do_not_change_from_run_to_run() -> None:
    for op in OPS:
        arguments = make_arguments(op, Case(2, 49, 40, 20))
        first, second = (run(op, copy(arguments), "triton") for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_reasons() -> None:
    x = torch.randn(1, 3, 4100)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ik.BackendError, match="at most 4096 channels, not 4100"):
        ik.gather_tokens(x, indices, backend="triton")
    with pytest.raises(ik.BackendError, match="at most 16384 tokens, not 20000"):
        ik.select_tokens(torch.randn(1, 20000), 5, backend="triton")
    q = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(ik.BackendError, match="no product of bfloat16"):
        ik.token_cut_loss(q, q, indices, 1.0, backend="triton")


@pytest.mark.parametrize("gradients", [False, True])
def test_idle_model(gradients: bool) -> None:
    """The chain of a whole model: without gradients from the plan of each block, with them from ``block.py``."""
    import timm

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **kwargs).eval()
    ik.apply_idle(model, schedule=[1.0, 0.5, 0.25])
    image = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        with ik.use_backend("reference"):
            wanted = model(image)
        with ik.use_backend("triton"):
            found = model(image)
    assert found.requires_grad == gradients
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
