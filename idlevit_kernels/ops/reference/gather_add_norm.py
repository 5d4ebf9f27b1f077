from __future__ import annotations

from torch import Tensor

from ..dtypes import accumulate_dtype
from .gather_tokens import gather_tokens
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
