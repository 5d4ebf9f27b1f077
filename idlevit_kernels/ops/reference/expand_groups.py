from __future__ import annotations

import torch
from torch import Tensor

from .gather_tokens import gather_tokens


def expand_groups(
    tokens: Tensor,  # [B, n, C]
    groups: Tensor,  # [B, T] in [-1, n)
) -> Tensor:  # [B, T, C]: each token the row of its group, zero for -1
    with_nobody = torch.cat([tokens.new_zeros((tokens.shape[0], 1, tokens.shape[2])), tokens], dim=1)
    return gather_tokens(with_nobody, groups + 1)
