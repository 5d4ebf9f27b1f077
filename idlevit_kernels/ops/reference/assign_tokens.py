from __future__ import annotations

import torch
from torch import Tensor

from .select_spread import at, in_bounds

NOBODY = -1


def assign_tokens(
    features: Tensor,  # [B, N, d] unit vectors, see in_bounds
    indices: Tensor,  # [B, n] of the representatives, ascending, prefix tokens first
    num_prefix_tokens: int,
    padding: Tensor | None,  # [B, N] bool, True for padding: it follows nobody, and nobody follows it
) -> tuple[Tensor, Tensor]:  # groups [B, T] int64: a place in indices, or -1; sizes [B, n], dtype of features
    """Each token belongs to the representative with the largest dot product, of equal ones to the first; each
    representative and each prefix token to itself."""
    B, N, _ = features.shape
    n = indices.shape[1]
    features = in_bounds(features)
    own = indices[:, num_prefix_tokens:] - num_prefix_tokens  # [B, K]
    similarity = features @ at(features, own).mT  # [B, N, K]
    if padding is not None:
        similarity = similarity.masked_fill(padding.gather(1, own).unsqueeze(1), -torch.inf)
    groups = similarity.argmax(2) + num_prefix_tokens
    if padding is not None:
        groups = groups.masked_fill(padding, NOBODY)
    groups = torch.cat([groups.new_empty((B, num_prefix_tokens)), groups], dim=1)
    groups = groups.scatter(1, indices, torch.arange(n, device=indices.device).expand(B, -1))
    counted = features.new_zeros((B, n + 1)).scatter_add_(1, groups + 1, features.new_ones(groups.shape))
    return groups, counted[:, 1:]
