from __future__ import annotations

from typing import Any

from torch import Tensor

from ..record import Tolerance, op
from .gather_tokens import gather_tokens, row_index


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(),
    arguments=lambda s: (s.x, s.indices, s.tokens),
    bytes_moved=lambda s: s.indices + 2 * s.image,
)
def scatter_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    tokens: Tensor,  # [B, n, C]
) -> Tensor:  # [B, T, C]
    return x.scatter(1, row_index(indices, x.shape[2]), tokens)


@scatter_tokens.fake
def _(x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@scatter_tokens.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, tokens = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(indices)


@scatter_tokens.backward
def _(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    grad_x = clear_rows(grad, indices, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_tokens = gather_tokens.call(grad, indices, backend=ctx.backend).to(ctx.dtype)
    return grad_x, None, grad_tokens


def clear_rows(grad: Tensor, indices: Tensor, backend: str) -> Tensor:
    """The gradient that passes a scatter to the rows it left alone."""
    zeros = grad.new_zeros((*indices.shape, grad.shape[2]))
    return scatter_tokens.call(grad, indices, zeros, backend=backend)


@op(
    kernels={"cpu", "cuda", "triton"},
    tolerance=Tolerance(),
    arguments=lambda s: (s.x, s.indices, s.tokens),
    bytes_moved=lambda s: s.indices + 2 * s.kept,
)
def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    x.scatter_(1, row_index(indices, x.shape[2]), tokens)


@scatter_tokens_.fake
def _(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    return None
