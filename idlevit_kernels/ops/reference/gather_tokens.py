from __future__ import annotations

from torch import Tensor


def row_index(indices: Tensor, channels: int) -> Tensor:
    """[B, n] token indices as a [B, n, C] index for ``torch.gather`` and ``torch.scatter``."""
    return indices.unsqueeze(-1).expand(-1, -1, channels)


def gather_tokens(
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
) -> Tensor:  # [B, n, C]
    return x.gather(1, row_index(indices, x.shape[2]))
