"""token_cut_loss in plain PyTorch on any device, a tile of rows at a time: it holds no [B, T, T]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..reference.token_cut_loss import across_cut, cut_loss, row_weights, token_sides
from .reference import check_indices

# Logits of a tile: 8 MB in float32, the fastest of 1 to 16 MB on two cores of an Intel Xeon (AVX-512).
_TILE_ELEMENTS = 1 << 21


def _tiles(q: Tensor) -> Iterator[slice]:
    """Rows whose logits [B, rows, T] fill one tile; a single row where even that is larger."""
    B, T, _ = q.shape
    rows = max(1, _TILE_ELEMENTS // max(1, B * T))
    for start in range(0, T, rows):
        yield slice(start, min(start + rows, T))


def _logits(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """[B, rows, T]; k is in the accumulate type already."""
    return (scale * q[:, rows].to(k.dtype)) @ k.mT


def token_cut_loss(
    q: Tensor, k: Tensor, indices: Tensor, scale: float, num_prefix_tokens: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_indices("token_cut_loss", indices, q.shape[1])
    k = k.to(accumulate_dtype(q.dtype))
    sides = token_sides(indices, q.shape[1], num_prefix_tokens)
    lse, share = k.new_empty(q.shape[:2]), k.new_empty(q.shape[:2])
    for rows in _tiles(q):
        logits = _logits(q, k, rows, scale)
        torch.logsumexp(logits, -1, out=lse[:, rows])
        attention = logits.sub_(lse[:, rows].unsqueeze(-1)).exp_()
        share[:, rows] = attention.mul_(across_cut(sides[:, rows], sides)).sum(-1)
    return cut_loss(share, sides, kind), lse, share


def token_cut_loss_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    lse: Tensor,
    share: Tensor,
    scale: float,
    num_prefix_tokens: int,
    kind: str,
) -> tuple[Tensor, Tensor]:
    keys = k.to(share.dtype)
    sides = token_sides(indices, q.shape[1], num_prefix_tokens)
    # The factor of the logits' gradient and that of the loss, both a number a row.
    factor = row_weights(sides, kind, share.dtype) * share * (2 * scale / max(1, share.numel())) * grad
    grad_q, grad_k = q.new_empty(q.shape), torch.zeros_like(keys)
    for rows in _tiles(q):
        attention = _logits(q, keys, rows, scale).sub_(lse[:, rows].unsqueeze(-1)).exp_()
        member = across_cut(sides[:, rows], sides).to(share.dtype)
        grad_logits = attention.mul_(member.sub_(share[:, rows].unsqueeze(-1))).mul_(factor[:, rows].unsqueeze(-1))
        grad_q[:, rows] = (grad_logits @ keys).to(q.dtype)
        grad_k.baddbmm_(grad_logits.mT, q[:, rows].to(keys.dtype))
    return grad_q, grad_k.to(k.dtype)
