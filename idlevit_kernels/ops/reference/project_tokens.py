from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .layer_norm import layer_norm


def project_tokens(
    x: Tensor,  # [B, T, C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    projection: Tensor,  # [C, d]
    num_prefix_tokens: int,
) -> Tensor:  # [B, N, d] unit vectors, accumulate type; zero where the projection is
    normed = layer_norm(x[:, num_prefix_tokens:], norm_weight, norm_bias, eps)
    return F.normalize(normed @ projection.to(normed.dtype), dim=-1)
