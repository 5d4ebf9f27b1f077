from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..record import Tolerance, op
from .gradients import cast, layer_norm_backward
from .layer_norm import layer_norm


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(rows=1),
    arguments=lambda s: (s.x, s.random(s.case.B, s.case.C), *s.norm),
    bytes_moved=lambda s: s.image + s.B * s.vector + 2 * s.vector + s.scores,
)
def token_scores(
    x: Tensor,  # [B, T, C]
    direction: Tensor,  # [B, C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:  # [B, T], accumulate type
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    return torch.einsum("btc,bc->bt", normed, direction.to(normed.dtype))


@token_scores.fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


@token_scores.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, direction, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, direction, weight, bias)


@token_scores.backward
def _(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, direction, weight, bias = ctx.saved_tensors
    normed = layer_norm(x, weight, bias, ctx.eps)
    grad_direction = torch.einsum("bt,btc->bc", grad, normed).to(direction.dtype)
    grad_normed = grad.unsqueeze(-1) * direction.to(grad.dtype).unsqueeze(1)
    grad_x, grad_weight, grad_bias = layer_norm_backward(grad_normed, x, weight, ctx.eps)
    return grad_x.to(x.dtype), grad_direction, cast(grad_weight, weight), cast(grad_bias, bias), None
