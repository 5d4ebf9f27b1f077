from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import accumulate_dtype
from ..record import Tolerance, op
from .expand_tokens import expand_tokens
from .gather_tokens import gather_tokens
from .gradients import cast, layer_norm_backward
from .layer_norm import layer_norm


def add_branch(
    tokens: Tensor,  # [B, n, C]
    branch: Tensor,  # [B, n, C]
    gamma: Tensor | None,  # [C]
    scale: float,
) -> Tensor:  # [B, n, C]
    acc = accumulate_dtype(tokens.dtype)
    factor = scale if gamma is None else scale * gamma.to(acc)
    return (tokens.to(acc) + factor * branch.to(acc)).to(tokens.dtype)


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(rows=1, stored=4),  # the norm amplifies the rounding of the stored sum
    arguments=lambda s: (s.x, s.indices, s.branch, s.gamma, 0.5, *s.norm),
    bytes_moved=lambda s: s.indices + 4 * s.kept + 2 * s.vector,
)
def gather_add_norm(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    branch: Tensor,  # [B, n, C]
    gamma: Tensor | None,  # [C]
    scale: float,
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # tokens [B, n, C], LN(tokens) [B, n, C]
    tokens = add_branch(gather_tokens(x, indices), branch, gamma, scale)
    return tokens, layer_norm(tokens, norm_weight, norm_bias, eps).to(x.dtype)


@gather_add_norm.fake
def _(x: Tensor, indices: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (*indices.shape, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape)


@gather_add_norm.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, branch, gamma, ctx.scale, weight, bias, ctx.eps = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(indices, save_branch(ctx, branch, gamma), gamma, weight, bias, output[0])


@gather_add_norm.backward
def _(ctx: Any, grad_tokens: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
    indices, branch, gamma, weight, bias, tokens = ctx.saved_tensors
    grad, grad_weight, grad_bias = layer_norm_backward(grad_normed, tokens, weight, ctx.eps)
    grad = grad_tokens + grad.to(grad_tokens.dtype)
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = expand_tokens.call(grad, indices, ctx.num_tokens, backend=ctx.backend)
    grad_branch, grad_gamma = branch_backward(ctx, grad, branch, gamma)
    return grad_x, None, grad_branch, grad_gamma, None, cast(grad_weight, weight), cast(grad_bias, bias), None


def save_branch(ctx: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """What the backward needs of the branch: its type, and itself only where gamma has a gradient."""
    ctx.branch_dtype = branch.dtype
    return None if gamma is None else branch


def branch_backward(
    ctx: Any, grad: Tensor, branch: Tensor | None, gamma: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of branch and gamma, where ``add_branch`` has the gradient ``grad``."""
    if branch is None or gamma is None:
        return (grad if ctx.scale == 1 else grad * ctx.scale).to(ctx.branch_dtype), None
    grad_gamma = (ctx.scale * grad * branch).sum((0, 1), dtype=accumulate_dtype(grad.dtype))
    return (grad * (ctx.scale * gamma)).to(ctx.branch_dtype), cast(grad_gamma, gamma)
