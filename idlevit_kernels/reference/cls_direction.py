from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cls_direction(
    x: Tensor,  # [B, T, C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    qkv_weight: Tensor,  # [3A, C]
    qkv_bias: Tensor | None,  # [3A]
) -> Tensor:  # [B, C], dtype of x
    width = qkv_weight.shape[0] // 3
    query_weight, key_weight, _ = qkv_weight.split(width)
    normed = F.layer_norm(x[:, 0], x.shape[2:], norm_weight, norm_bias, eps)
    return F.linear(normed, query_weight, None if qkv_bias is None else qkv_bias[:width]) @ key_weight
