from __future__ import annotations

from typing import Any

from torch import Tensor

from ..record import Tolerance, op
from .gather_tokens import gather_tokens
from .scatter_tokens import scatter_tokens


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(),
    arguments=lambda s: (s.tokens, s.indices, s.case.T),
    bytes_moved=lambda s: s.indices + s.kept + s.image,
)
def expand_tokens(
    tokens: Tensor,  # [B, n, C]
    indices: Tensor,  # [B, n]
    num_tokens: int,
) -> Tensor:  # [B, T, C]; zero where no index points
    zeros = tokens.new_zeros(tokens.shape[0], num_tokens, tokens.shape[2])
    return scatter_tokens(zeros, indices, tokens)


@expand_tokens.fake
def _(tokens: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], num_tokens, tokens.shape[2]))


@expand_tokens.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


@expand_tokens.backward
def _(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return gather_tokens.call(grad, indices, backend=ctx.backend), None, None
