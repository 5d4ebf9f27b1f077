from __future__ import annotations

from typing import Any

from torch import Tensor

from ..record import RECORDS, Tolerance, op


def row_index(indices: Tensor, channels: int) -> Tensor:
    """[B, n] token indices as a [B, n, C] index for ``torch.gather`` and ``torch.scatter``."""
    return indices.unsqueeze(-1).expand(-1, -1, channels)


@op(
    kernels={"cpu", "cuda", "triton"},
    differentiable=True,
    tolerance=Tolerance(),
    arguments=lambda s: (s.x, s.indices),
    bytes_moved=lambda s: s.indices + 2 * s.kept,
)
def gather_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
) -> Tensor:  # [B, n, C]
    return x.gather(1, row_index(indices, x.shape[2]))


@gather_tokens.fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((*indices.shape, x.shape[2]))


@gather_tokens.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(indices)


@gather_tokens.backward
def _(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return RECORDS["expand_tokens"].call(grad, indices, ctx.num_tokens, backend=ctx.backend), None
