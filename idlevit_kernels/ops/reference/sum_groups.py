from __future__ import annotations

from torch import Tensor

from ..dtypes import accumulate_dtype
from .gather_tokens import row_index


def sum_groups(
    x: Tensor,  # [B, T, C]
    groups: Tensor,  # [B, T] in [-1, n); a token of -1 counts nowhere
    num_groups: int,
) -> Tensor:  # [B, n, C], accumulate type
    B, _, C = x.shape
    acc = accumulate_dtype(x.dtype)
    total = x.new_zeros((B, num_groups + 1, C), dtype=acc)
    return total.scatter_add(1, row_index(groups + 1, C), x.to(acc))[:, 1:]
