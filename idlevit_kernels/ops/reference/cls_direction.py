from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .layer_norm import layer_norm


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
    normed = layer_norm(x[:, 0], norm_weight, norm_bias, eps).to(qkv_weight.dtype)
    query = F.linear(normed, query_weight, None if qkv_bias is None else qkv_bias[:width])
    return (query @ key_weight).to(x.dtype)
