"""The token cut loss (arXiv 2310.05654, section 3.3) and its gradient.

With m the 0/1 selection (1 for prefix tokens too), a_i the attention that row i pays to the selected tokens and w_i
the part of it that goes to prefix tokens, row i costs inter_i^2 + intra_i^2, where
inter_i = 1 - a_i if m_i else a_i - w_i, and intra_i = 1 - a_i if m_i else 0.
So inter_i is the attention of the row across the cut: of a selected row to the idle tokens, of an idle row to the
kept image tokens. Calling that ``share``, the loss is mean_i c_i share_i^2 with one constant for each side of the cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import Sample
from ..dtypes import accumulate_dtype
from ..record import Shape, Tolerance, op

# c_i of a selected row and of an idle row.
ROW_WEIGHTS = {"both": (2.0, 1.0), "inter": (1.0, 1.0), "intra": (1.0, 0.0), "none": (0.0, 0.0)}
PREFIX, KEPT, IDLE = 0, 1, 2


def token_sides(indices: Tensor, num_tokens: int, num_prefix_tokens: int) -> Tensor:  # [B, T] int8
    sides = indices.new_full((indices.shape[0], num_tokens), IDLE, dtype=torch.int8).scatter_(1, indices, KEPT)
    sides[:, :num_prefix_tokens] = PREFIX
    return sides


def row_weights(sides: Tensor, kind: str, dtype: torch.dtype) -> Tensor:  # [B, T]
    selected, idle = ROW_WEIGHTS[kind]
    return torch.full_like(sides, selected, dtype=dtype).masked_fill_(sides == IDLE, idle)


def cut_loss(share: Tensor, sides: Tensor, kind: str) -> Tensor:
    """The loss from the rows' shares: a scalar, 0 for an empty batch."""
    return (row_weights(sides, kind, share.dtype) * share.square()).sum() / max(1, share.numel())


def across_cut(row_sides: Tensor, column_sides: Tensor) -> Tensor:  # [B, R], [B, T] -> [B, R, T] bool
    """Which tokens count in a row's share: the idle ones for a selected row, the kept image tokens for an idle row."""
    wanted = torch.full_like(row_sides, IDLE).masked_fill_(row_sides == IDLE, KEPT)
    return wanted.unsqueeze(2) == column_sides.unsqueeze(1)


def _macs(q: Shape, *_: Shape) -> int:
    """Of the logits q k^T."""
    assert q is not None
    return q[0] * q[1] * q[1] * q[2]


@op(
    kernels={"triton"},
    composed={"cpu", "cuda"},  # matrix products over tiles: PyTorch's library has those
    differentiable=True,
    tolerance=Tolerance(rows=1),
    arguments=lambda s: (s.x, s.random(*s.x.shape), s.indices, s.case.C**-0.5, s.case.P, "both"),
    bytes_moved=lambda s: s.indices + 2 * s.image + 2 * s.scores,
    macs=_macs,
)
def token_cut_loss(
    q: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    scale: float,
    num_prefix_tokens: int,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, log-sum-exp of each row [B, T], share [B, T]
    acc = accumulate_dtype(q.dtype)
    logits = scale * q.to(acc) @ k.to(acc).mT  # [B, T, T]
    attention = logits.softmax(-1)
    sides = token_sides(indices, q.shape[1], num_prefix_tokens)
    selected = sides != IDLE  # m
    a = (attention * selected.unsqueeze(1)).sum(-1)
    w = attention[..., :num_prefix_tokens].sum(-1)
    inter = torch.where(selected, 1 - a, a - w)
    intra = torch.where(selected, 1 - a, torch.zeros_like(a))
    rows = {
        "both": inter.square() + intra.square(),
        "inter": inter.square(),
        "intra": intra.square(),
        "none": torch.zeros_like(a),
    }[kind]
    return rows.sum() / max(1, rows.numel()), logits.logsumexp(-1), inter


@token_cut_loss.fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(q.dtype)
    return q.new_empty((), dtype=acc), q.new_empty(q.shape[:2], dtype=acc), q.new_empty(q.shape[:2], dtype=acc)


@token_cut_loss.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, indices, *ctx.options = inputs
    _, lse, share = output
    ctx.mark_non_differentiable(lse, share)
    ctx.save_for_backward(q, k, indices, lse, share)


@token_cut_loss.backward
def _(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_q, grad_k = token_cut_loss_backward.call(grad, *ctx.saved_tensors, *ctx.options, backend=ctx.backend)
    return grad_q, grad_k, None, None, None, None


def _backward_arguments(s: Sample) -> tuple[Any, ...]:
    q, k, indices, *options = token_cut_loss.arguments(s)
    _, lse, share = token_cut_loss(q, k, indices, *options)
    # The loss is a mean over B * T rows: this gradient makes those of q and k numbers of some size.
    grad = torch.tensor(float(s.case.B * s.case.T * s.case.C**0.5), dtype=share.dtype, device=share.device)
    return grad, q, k, indices, lse, share, *options


@op(
    kernels={"triton"},
    composed={"cpu", "cuda"},
    derivative_of="token_cut_loss",
    tolerance=Tolerance(rows=4, stored=2),  # the gradient of the logits is rounded on the way
    arguments=_backward_arguments,
    bytes_moved=lambda s: s.indices + 4 * s.image + 2 * s.scores,
    macs=lambda grad, q, *_: 3 * _macs(q),  # the logits again, and their gradient times k and q
)
def token_cut_loss_backward(
    grad: Tensor,  # scalar
    q: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    lse: Tensor,  # [B, T]
    share: Tensor,  # [B, T]
    scale: float,
    num_prefix_tokens: int,
    kind: str,
) -> tuple[Tensor, Tensor]:  # gradients of q and k
    """With W = exp(logits - lse): d loss / d logits_ij = 2 c_i share_i W_ij ([j across cut of i] - share_i) / (B T)."""
    acc = accumulate_dtype(q.dtype)
    attention = (scale * q.to(acc) @ k.to(acc).mT - lse.unsqueeze(-1)).exp()
    sides = token_sides(indices, q.shape[1], num_prefix_tokens)
    factor = 2 * row_weights(sides, kind, acc) * share
    grad_logits = factor.unsqueeze(-1) * attention * (across_cut(sides, sides).to(acc) - share.unsqueeze(-1))
    grad_logits = grad_logits * (grad * scale / max(1, share.numel()))
    return (grad_logits @ k.to(acc)).to(q.dtype), (grad_logits.mT @ q.to(acc)).to(k.dtype)


@token_cut_loss_backward.fake
def _(grad: Tensor, q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)
