from __future__ import annotations

from torch import Tensor

from .scatter_tokens import scatter_tokens


def expand_tokens(
    tokens: Tensor,  # [B, n, C]
    indices: Tensor,  # [B, n]
    num_tokens: int,
) -> Tensor:  # [B, T, C]; zero where no index points
    zeros = tokens.new_zeros(tokens.shape[0], num_tokens, tokens.shape[2])
    return scatter_tokens(zeros, indices, tokens)
