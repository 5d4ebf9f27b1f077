from __future__ import annotations

from torch import Tensor

from ..dtypes import accumulate_dtype
from .expand_groups import expand_groups


def follow_tokens(
    x: Tensor,  # [B, T, C]
    groups: Tensor,  # [B, T] in [-1, n)
    branch1: Tensor,  # [B, n, C]
    gamma1: Tensor | None,  # [C]
    scale1: float,
    branch2: Tensor,  # [B, n, C]
    gamma2: Tensor | None,  # [C]
    scale2: float,
) -> Tensor:  # [B, T, C]; each token and what the two branches added to its representative
    acc = accumulate_dtype(x.dtype)
    factor1 = scale1 if gamma1 is None else scale1 * gamma1.to(acc)
    factor2 = scale2 if gamma2 is None else scale2 * gamma2.to(acc)
    change = factor1 * branch1.to(acc) + factor2 * branch2.to(acc)
    return (x.to(acc) + expand_groups(change, groups)).to(x.dtype)


def follow_tokens_(
    x: Tensor,
    groups: Tensor,
    branch1: Tensor,
    gamma1: Tensor | None,
    scale1: float,
    branch2: Tensor,
    gamma2: Tensor | None,
    scale2: float,
) -> None:
    x.copy_(follow_tokens(x, groups, branch1, gamma1, scale1, branch2, gamma2, scale2))
