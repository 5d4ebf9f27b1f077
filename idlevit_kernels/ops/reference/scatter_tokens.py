from __future__ import annotations

from torch import Tensor

from .gather_tokens import row_index


def scatter_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    tokens: Tensor,  # [B, n, C]
) -> Tensor:  # [B, T, C]
    return x.scatter(1, row_index(indices, x.shape[2]), tokens)


def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    x.scatter_(1, row_index(indices, x.shape[2]), tokens)
