from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import layer_norm


def token_scores(
    x: Tensor,  # [B, T, C]
    direction: Tensor,  # [B, C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:  # [B, T], accumulate type
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    return torch.einsum("btc,bc->bt", normed, direction.to(normed.dtype))
