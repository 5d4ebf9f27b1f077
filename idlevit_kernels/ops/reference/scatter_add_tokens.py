from __future__ import annotations

from torch import Tensor

from .gather_add_norm import add_branch
from .scatter_tokens import scatter_tokens, scatter_tokens_


def scatter_add_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    tokens: Tensor,  # [B, n, C]
    branch: Tensor,  # [B, n, C]
    gamma: Tensor | None,  # [C]
    scale: float,
) -> Tensor:  # [B, T, C]; the rows of x, and tokens + scale * gamma * branch at the indices
    return scatter_tokens(x, indices, add_branch(tokens, branch, gamma, scale))


def scatter_add_tokens_(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> None:
    scatter_tokens_(x, indices, add_branch(tokens, branch, gamma, scale))
