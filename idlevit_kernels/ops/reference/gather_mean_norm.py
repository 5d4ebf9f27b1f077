from __future__ import annotations

from torch import Tensor

from .layer_norm import layer_norm
from .sum_groups import sum_groups


def gather_mean_norm(
    x: Tensor,  # [B, T, C]
    groups: Tensor,  # [B, T] in [-1, n)
    sizes: Tensor,  # [B, n]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # tokens [B, n, C], the mean of each group; LN(tokens) [B, n, C]
    total = sum_groups(x, groups, sizes.shape[1])
    tokens = (total / sizes.to(total.dtype).unsqueeze(-1)).to(x.dtype)
    return tokens, layer_norm(tokens, norm_weight, norm_bias, eps).to(x.dtype)
