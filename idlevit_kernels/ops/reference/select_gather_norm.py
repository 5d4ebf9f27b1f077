from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..record import Tolerance, op
from .gather_norm_backward import gather_norm_backward
from .gather_tokens import gather_tokens
from .gradients import cast
from .layer_norm import layer_norm
from .select_tokens import select_tokens


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(rows=1, stored=1),
    arguments=lambda s: (s.x, s.scores, *s.counts, *s.norm),
    bytes_moved=lambda s: s.scores + s.indices + 2 * s.kept + 2 * s.vector,
)
def select_gather_norm(
    x: Tensor,  # [B, T, C]
    scores: Tensor,  # [B, T]
    num_keep: int,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # indices [B, n], LN(x[indices]) [B, n, C]
    indices = select_tokens(scores, num_keep, num_prefix_tokens)
    return indices, layer_norm(gather_tokens(x, indices), norm_weight, norm_bias, eps).to(x.dtype)


@select_gather_norm.fake
def _(x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, *_: object) -> tuple[Tensor, Tensor]:
    n = num_prefix_tokens + num_keep
    return x.new_empty((x.shape[0], n), dtype=torch.int64), x.new_empty((x.shape[0], n, x.shape[2]))


@select_gather_norm.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, _, weight, bias, ctx.eps = inputs
    indices, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, indices, weight, bias)


@select_gather_norm.backward
def _(ctx: Any, _: Any, grad: Tensor) -> tuple[Any, ...]:
    x, indices, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = gather_norm_backward.call(grad, x, indices, weight, ctx.eps, backend=ctx.backend)
    return grad_x, None, None, None, cast(grad_weight, weight), cast(grad_bias, bias), None
