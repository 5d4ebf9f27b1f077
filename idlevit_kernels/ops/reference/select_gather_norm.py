from __future__ import annotations

from torch import Tensor

from .gather_tokens import gather_tokens
from .layer_norm import layer_norm
from .select_tokens import select_tokens


def select_gather_norm(
    x: Tensor,  # [B, T, C]
    scores: Tensor,  # [B, T]
    num_keep: int,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # indices [B, n], LN(x[indices]) [B, n, C]
    indices = select_tokens(scores, num_keep, num_prefix_tokens)
    return indices, layer_norm(gather_tokens(x, indices), norm_weight, norm_bias, eps).to(x.dtype)
