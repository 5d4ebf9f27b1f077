"""The kernels of idle tokens that follow against their references, and the references against plain sentences."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from idlevit_kernels.ops.backends import cpu, cpu_follow
from idlevit_kernels.ops.testing import error

OPS = (
    "project_tokens", "select_spread", "assign_tokens", "gather_mean_norm", "follow_tokens", "sum_groups",
    "expand_groups",
)  # fmt: skip
reference: dict[str, Any] = {
    name: getattr(importlib.import_module(f"idlevit_kernels.ops.reference.{name}"), name) for name in OPS
}
# What a float64 result is compared with: the accumulate type's and the stored type's roundoff, a few times each.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
DTYPES = tuple(TOLERANCE)
# B, N, C, K, P, d: the usual, odd sizes, no prefix, one token, all kept, nothing, a handful, and many tokens.
SHAPES = [
    (2, 196, 384, 120, 1, 32), (3, 49, 33, 17, 2, 7), (2, 40, 20, 40, 0, 16), (1, 1, 8, 1, 1, 4), (0, 10, 8, 3, 1, 4),
    (2, 33, 300, 5, 5, 33), (1, 600, 64, 250, 1, 32), (4, 64, 16, 63, 0, 32), (2, 21, 3, 1, 5, 1),
]  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.extension() is None, reason="the native extension is not built"),
]


def exact_features(B: int, N: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums of products of these are exact in float32, so that ties are ties for every kernel. Some tokens are alike."""
    scale = 2.0 ** torch.tensor(max(1.0, d**0.5 / 4)).log2().ceil()
    f = torch.randint(-4, 5, (B, N, d)).to(dtype) / (8 * scale)
    if N > 3:
        f[:, 3] = f[:, 1]
    return f


def some_padding(B: int, N: int) -> Tensor:
    """A different number of tokens at the end of each image, and one in the middle of the last."""
    padding = torch.arange(N).expand(B, N) >= (N - torch.arange(B) * N // 4).clamp(min=1).unsqueeze(1)
    padding = padding.clone()
    if B and N > 8:
        padding[-1, 4] = True
    return padding


@pytest.fixture(params=[1, 4], ids=["one-thread", "four-threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four threads one or two images are shared by a team."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.fixture(params=cpu.extension().cpu_instruction_sets() if cpu.extension() else [])
def instruction_set(request: pytest.FixtureRequest) -> Any:
    extension: Any = cpu.extension()
    before = extension.cpu_instruction_set()
    extension.cpu_set_instruction_set(request.param)
    yield
    extension.cpu_set_instruction_set(before)


def close(actual: Any, wanted: Any, dtype: torch.dtype) -> None:
    for a, w in zip(*((t,) if isinstance(t, Tensor) else t for t in (actual, wanted)), strict=True):
        assert error(a, w) <= TOLERANCE[dtype]


def wide(*values: Any) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("B, N, C, K, P, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("instruction_set", "threads")
def test_the_same_tokens_are_chosen_and_followed(
    B: int, N: int, C: int, K: int, P: int, d: int, dtype: torch.dtype, padded: bool
) -> None:
    torch.manual_seed(B + N)
    f, padding = exact_features(B, N, d, dtype), some_padding(B, N) if padded else None
    indices = reference["select_spread"](f, K, P, padding)
    groups, sizes = reference["assign_tokens"](f, indices, P, padding)
    assert torch.equal(cpu_follow.select_spread(f, K, P, padding), indices)
    for found in (
        (indices, *cpu_follow.assign_tokens(f, indices, P, padding)), cpu_follow.spread_groups(f, K, P, padding)
    ):  # fmt: skip
        assert [t.dtype for t in found] == [torch.int64, torch.int64, dtype]
        assert all(torch.equal(a, b) for a, b in zip(found, (indices, groups, sizes), strict=True))


@pytest.mark.parametrize("B, N, C, K, P, d", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed"])
@pytest.mark.usefixtures("threads")
def test_values(B: int, N: int, C: int, K: int, P: int, d: int, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(N)
    T, n = P + N, P + K
    x = torch.randn(B, T, C, dtype=dtype)
    if layout == "offset":
        x = torch.randn(B, T + 3, C + 5, dtype=dtype)[:, 2 : T + 2, 3 : C + 3]
    elif layout == "transposed":
        x = torch.randn(B, C, T, dtype=dtype).transpose(1, 2)
    norm = (1 + 0.1 * torch.randn(C, dtype=dtype), 0.1 * torch.randn(C, dtype=dtype), 1e-6)
    projection = torch.randn(C, d, dtype=dtype)
    if C > 3:  # a few channels may have next to no variance, and their norm any error
        arguments: tuple[Any, ...] = (x, *norm, projection, P)
        close(cpu_follow.project_tokens(*arguments), reference["project_tokens"](*wide(*arguments)), dtype)

    f = exact_features(B, N, d)
    indices = reference["select_spread"](f, K, P, None)
    groups, sizes = reference["assign_tokens"](f, indices, P, None)
    if N > 4:  # one that follows nobody
        idle = [t for t in range(P, T) if B and t not in indices[0].tolist()][:1]
        groups[:1, idle] = -1
    for gamma in (None, torch.randn(C, dtype=dtype)):
        branches = (torch.randn(B, n, C, dtype=dtype), gamma, 0.5, torch.randn(B, n, C, dtype=dtype), None, 2.0)
        arguments = (x, groups, *branches)
        wanted = reference["follow_tokens"](*wide(*arguments))
        close(cpu_follow.follow_tokens(*arguments), wanted, dtype)
        y = x.clone()
        cpu_follow.follow_tokens_(y, *arguments[1:])
        close(y, wanted, dtype)
        assert torch.equal(y[groups == -1], x[groups == -1])
    for weight, bias in ((None, None), (norm[0], None), norm[:2]):
        if C > 3:
            arguments = (x, groups, sizes, weight, bias, 1e-6)
            close(cpu_follow.gather_mean_norm(*arguments), reference["gather_mean_norm"](*wide(*arguments)), dtype)
    close(cpu_follow.sum_groups(x, groups, n), reference["sum_groups"](x.double(), groups, n), dtype)
    tokens = torch.randn(B, n, C, dtype=dtype)
    assert torch.equal(cpu_follow.expand_groups(tokens, groups), reference["expand_groups"](tokens, groups))


@pytest.mark.usefixtures("instruction_set")
def test_projections_of_every_width() -> None:
    x, weight = torch.randn(2, 30, 700), torch.rand(700)
    for d in (1, 15, 16, 31, 32, 33, 64, 100):
        arguments = (x, weight, None, 1e-6, torch.randn(700, d), 1)
        close(cpu_follow.project_tokens(*arguments), reference["project_tokens"](*wide(*arguments)), torch.float32)


def test_a_token_without_a_direction_has_zero_features() -> None:
    projection = torch.randn(8, 4)
    for op in (cpu_follow.project_tokens, reference["project_tokens"]):
        assert torch.equal(op(torch.ones(1, 3, 8), None, None, 1e-6, projection, 1), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("K", [5, 16, 17, 60])
def test_not_a_number_counts_as_zero(K: int) -> None:
    torch.manual_seed(0)
    f = exact_features(2, 64, 8)
    f[0, ::7] = torch.nan
    f[1, 5, 2] = torch.inf
    indices = reference["select_spread"](f, K, 1, None)
    groups, sizes = reference["assign_tokens"](f, indices, 1, None)
    found = cpu_follow.spread_groups(f, K, 1, None)
    assert all(torch.equal(a, b) for a, b in zip(found, (indices, groups, sizes), strict=True))
    assert torch.equal(indices, reference["select_spread"](f.nan_to_num(0, 0, 0), K, 1, None))


def test_features_of_any_length_are_safe() -> None:
    """They need not be unit vectors for every index to be one that exists."""
    for scale in (1e3, 1e30, 1e38):
        f = scale * torch.randn(2, 50, 8)
        indices, groups, sizes = cpu_follow.spread_groups(f, 20, 1, None)
        assert (indices.diff() > 0).all() and indices[:, 0].eq(0).all() and indices.max() <= 50
        assert groups.min() >= 0 and groups.max() <= 20 and sizes.sum(1).eq(51).all()


def test_what_is_chosen_differs() -> None:
    """Of 20 directions with ten tokens each, rounds find all with 40 to choose; one at a time finds 10 with ten."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(1, 20, 32), dim=-1)
    f = F.normalize(directions.repeat_interleave(10, 1) + 0.01 * torch.randn(1, 200, 32), dim=-1)
    kept = reference["select_spread"](f, 40, 1, None)[0, 1:] - 1
    assert len((kept // 10).unique()) == 20
    f = f[:, :100]
    kept = reference["select_spread"](f, 10, 0, None)[0]
    assert len((kept // 10).unique()) == 10


def test_padding_comes_last_and_follows_nobody() -> None:
    torch.manual_seed(0)
    f, padding = exact_features(1, 60, 16), torch.zeros(1, 60, dtype=torch.bool)
    padding[:, 40:] = True
    for K in (3, 30, 45):
        kept = reference["select_spread"](f, K, 2, padding)
        alone = reference["select_spread"](f[:, :40], min(K, 40), 2, None)
        assert torch.equal(kept[:, : 2 + min(K, 40)], alone)
        groups, sizes = reference["assign_tokens"](f, kept, 2, padding)
        real, sizes_alone = reference["assign_tokens"](f[:, :40], alone, 2, None)
        assert torch.equal(groups[:, :42], real) and torch.equal(sizes[:, : 2 + min(K, 40)], sizes_alone)
        idle = [t for t in range(42, 62) if t not in kept[0].tolist()]
        assert (groups[0, idle] == -1).all() and (sizes[:, 2 + min(K, 40) :] == 1).all()


def test_groups_out_of_range_and_indices_out_of_order_are_refused() -> None:
    x, groups = torch.randn(1, 6, 8), torch.tensor([[0, 1, 2, 3, 2, 1]])
    for bad in (4, -2):
        groups[0, 2] = bad
        with pytest.raises(ValueError, match="groups must be -1 or one of the 4 groups"):
            cpu_follow.sum_groups(x, groups, 4)
    for indices in ([0, 3, 3], [0, 3, 2], [1, 2, 3], [0, 2, 9]):
        with pytest.raises((ValueError, IndexError)):
            cpu_follow.assign_tokens(torch.randn(1, 6, 4), torch.tensor([indices]), 1, None)
