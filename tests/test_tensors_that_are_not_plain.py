"""Ops on tensors whose address is not where their values are: right, or refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

import idlevit_kernels as ik

INDICES = torch.tensor([[0, 2], [0, 3]])


def rows(x: Tensor) -> Tensor:
    return x.gather(1, INDICES[..., None].expand(-1, -1, x.shape[2]))


@pytest.fixture
def mesh() -> Iterator:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_a_distributed_tensor_is_refused(mesh) -> None:
    """At any place, not as the first argument alone."""

    def distributed(t: Tensor) -> Tensor:
        return distribute_tensor(t, mesh, [Replicate()])

    x, scores, weight = torch.randn(2, 7, 8), torch.randn(2, 7), torch.randn(8)
    for call in (
        lambda: ik.select_gather_norm(x, scores, 2, 1, distributed(weight), None, 1e-6),
        lambda: ik.gather_add_norm(x, INDICES, rows(x), distributed(weight), 1.0, weight, None, 1e-6),
        lambda: ik.scatter_tokens(x, INDICES, distributed(rows(x))),
        lambda: ik.scatter_tokens_(x, INDICES, distributed(rows(x))),
        lambda: ik.gather_tokens(x, distributed(INDICES)),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match="DTensor|sharding strategy"):
            call()


@torch.no_grad()
def test_freed_memory_is_refused() -> None:
    """A weight without memory is not one that is left out; tokens without memory are not read."""

    def freed(t: Tensor) -> Tensor:
        t.untyped_storage().resize_(0)
        return t

    x, scores = torch.randn(2, 7, 8), torch.randn(2, 7)
    for call in (
        lambda: ik.select_gather_norm(x, scores, 2, 1, freed(torch.ones(8)), None, 1e-6),
        lambda: ik.gather_add_norm(x, INDICES, rows(x), freed(torch.ones(8)), 1.0, None, None, 1e-6),
        lambda: ik.gather_add_norm(x, INDICES, freed(torch.randn(2, 2, 8)), None, 1.0, None, None, 1e-6),
        lambda: ik.token_scores(freed(torch.randn(2, 7, 8)), torch.randn(2, 8), None, None, 1e-6),
        lambda: ik.token_scores(x, freed(torch.randn(2, 8)), None, None, 1e-6),
        lambda: ik.select_tokens(freed(torch.randn(2, 7)), 2),
        lambda: ik.gather_tokens(freed(torch.randn(2, 7, 8)), INDICES),
        lambda: ik.scatter_tokens(freed(torch.randn(2, 7, 8)), INDICES, rows(x)),
        lambda: ik.scatter_tokens(x, INDICES, freed(torch.randn(2, 2, 8))),
        lambda: ik.scatter_tokens_(freed(torch.randn(2, 7, 8)), INDICES, rows(x)),
        lambda: ik.cls_direction(x, None, None, 1e-6, freed(torch.randn(24, 8)), None),
    ):
        with pytest.raises((ValueError, RuntimeError), match="storage was freed|data is not allocated"):
            call()
    many = torch.randn(100000)
    view = many[50000:50016].view(2, 1, 8).expand(2, 7, 8)
    many.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage was freed"):
        ik.gather_tokens(view, INDICES)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_lazy_minus_sign_is_seen(context) -> None:
    with context():
        base = torch.randn(2, 7, 8)
        x, tokens = torch._neg_view(base), torch._neg_view(torch.randn(2, 2, 8))
        wanted = -base
        assert torch.equal(ik.gather_tokens(x, INDICES), rows(wanted))
        assert torch.equal(ik.scatter_tokens(x, INDICES, tokens), reference_scatter(wanted, tokens.resolve_neg()))
        weight = torch._neg_view(torch.rand(8))
        found = ik.gather_add_norm(x, INDICES, tokens, weight, 1.0, weight, None, 1e-6)
        plain = [t.resolve_neg() for t in (x, tokens, weight)]
        expected = ik.gather_add_norm(plain[0], INDICES, plain[1], plain[2], 1.0, plain[2], None, 1e-6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert ik.scatter_tokens_(x, INDICES, tokens) is x
        assert torch.equal(x.resolve_neg(), reference_scatter(wanted, tokens.resolve_neg()))
        assert torch.equal(base, -x.resolve_neg())


def reference_scatter(x: Tensor, tokens: Tensor) -> Tensor:
    return x.scatter(1, INDICES[..., None].expand(-1, -1, x.shape[2]), tokens)


@torch.no_grad()
def test_in_place_calls_look_at_every_input() -> None:
    x, tokens = torch.randn(2, 7, 8), torch.randn(2, 2, 8)
    before = x.clone()
    with pytest.raises(ValueError, match="scatter_add_tokens_: gamma must be in other memory than x"):
        ik.scatter_add_tokens_(x, INDICES, tokens, tokens, x[0, 0], 1.0)
    with pytest.raises(ValueError, match="scatter_add_tokens_: branch must be in other memory than x"):
        ik.scatter_add_tokens_(x, INDICES, tokens, x[:, :2], None, 1.0)
    memory = torch.zeros(32, dtype=torch.int64)
    y, indices = memory.view(torch.float64).view(1, 4, 8), memory[:3].view(1, 3)
    indices.copy_(torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="scatter_tokens_: indices must be in other memory than x"):
        ik.scatter_tokens_(y, indices, torch.full((1, 3, 8), 1e300, dtype=torch.float64))
    assert torch.equal(x, before) and memory.sum() == 3


def test_an_inference_tensor_is_not_written_outside() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 7, 8)
        before = x.clone()
    tokens = torch.randn(2, 2, 8)
    for call in (
        lambda: ik.scatter_tokens_(x, INDICES, tokens),
        lambda: ik.scatter_add_tokens_(x, INDICES, tokens, tokens),
    ):
        for context in (torch.no_grad, torch.enable_grad):
            with (
                context(),
                pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"),
            ):
                call()
    assert torch.equal(x, before)
    with torch.inference_mode():
        ik.scatter_tokens_(x, INDICES, tokens)
        assert torch.equal(rows(x), tokens)
