from __future__ import annotations

from typing import Any

from torch import Tensor

from ..record import Tolerance, op
from .gather_add_norm import add_branch, branch_backward, save_branch
from .gather_tokens import gather_tokens
from .scatter_tokens import clear_rows, scatter_tokens, scatter_tokens_


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(rows=1, stored=4),
    arguments=lambda s: (s.x, s.indices, s.tokens, s.branch, s.gamma, 0.5),
    bytes_moved=lambda s: s.indices + 3 * s.kept + 2 * s.idle,
)
def scatter_add_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    tokens: Tensor,  # [B, n, C]
    branch: Tensor,  # [B, n, C]
    gamma: Tensor | None,  # [C]
    scale: float,
) -> Tensor:  # [B, T, C]; the rows of x, and tokens + scale * gamma * branch at the indices
    return scatter_tokens(x, indices, add_branch(tokens, branch, gamma, scale))


@scatter_add_tokens.fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@scatter_add_tokens.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, tokens, branch, gamma, ctx.scale = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(indices, save_branch(ctx, branch, gamma), gamma)


@scatter_add_tokens.backward
def _(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    indices, branch, gamma = ctx.saved_tensors
    grad_x = clear_rows(grad, indices, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_tokens = gather_tokens.call(grad, indices, backend=ctx.backend)
    grad_branch, grad_gamma = branch_backward(ctx, grad_tokens, branch, gamma)
    return grad_x, None, grad_tokens.to(ctx.dtype), grad_branch, grad_gamma, None


@op(
    kernels={"cpu", "cuda", "triton"},
    tolerance=Tolerance(rows=1, stored=4),
    arguments=lambda s: (s.x, s.indices, s.tokens, s.branch, s.gamma, 0.5),
    bytes_moved=lambda s: s.indices + 3 * s.kept,
)
def scatter_add_tokens_(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> None:
    scatter_tokens_(x, indices, add_branch(tokens, branch, gamma, scale))


@scatter_add_tokens_.fake
def _(*_: object) -> None:
    return None
