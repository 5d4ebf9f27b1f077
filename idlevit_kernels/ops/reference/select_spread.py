"""K tokens that differ from one another: farthest-point selection, a few tokens at a time.

``nearest`` of a token is its greatest similarity to a token that is chosen already; the smaller, the more the token
would add. One token at a time is exact, and what a handful of tokens needs. More are chosen in rounds of matrix
products: of twice as many candidates as a round shall choose, the tokens with the smallest ``nearest``, those stay that
are unlike the candidates before them, too. Of equal tokens the one with the lower index comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 16  # up to this K one token at a time; above it this many, evenly spaced, are chosen before the first round
ROUNDS = 4
PADDING, CHOSEN = 1e5, 1e6  # in ``nearest``: above every similarity, so they come last


def in_bounds(features: Tensor) -> Tensor:
    """Of unit vectors nothing changes; of others no similarity is as large as PADDING."""
    return features.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)


def at(features: Tensor, tokens: Tensor) -> Tensor:  # [B, N, d] at [B, m] -> [B, m, d]
    return features.gather(1, tokens.unsqueeze(-1).expand(-1, -1, features.shape[2]))


def smallest(values: Tensor, count: int) -> Tensor:  # [B, m] -> places [B, count], ascending by value, then by place
    return values.argsort(dim=1, stable=True)[:, :count]


def evenly_spaced(padding: Tensor, count: int) -> Tensor:  # [B, N] -> [B, count], among the tokens without padding
    order = padding.to(torch.uint8).argsort(dim=1, stable=True)
    real = (~padding).sum(1, keepdim=True).clamp(min=count)
    odd = 2 * torch.arange(count, device=padding.device) + 1
    return order.gather(1, odd * real // (2 * count))


def select_spread(
    features: Tensor,  # [B, N, d] unit vectors, see in_bounds
    num_keep: int,
    num_prefix_tokens: int,
    padding: Tensor | None,  # [B, N] bool, True for padding: chosen after every other token
) -> Tensor:  # [B, n] int64, ascending, prefix tokens first
    B, N, _ = features.shape
    K = num_keep
    features = in_bounds(features)
    padding = features.new_zeros((B, N), dtype=torch.bool) if padding is None else padding
    nearest = features.new_full((B, N), -CHOSEN).masked_fill_(padding, PADDING)
    chosen = torch.zeros_like(padding)

    def choose(tokens: Tensor) -> None:
        nonlocal nearest
        chosen.scatter_(1, tokens, True)
        nearest = torch.maximum(nearest, (features @ at(features, tokens).mT).amax(2))
        nearest = nearest.masked_fill(chosen, CHOSEN)

    if K == N:
        chosen[:] = True
    elif K <= EXACT:
        for _ in range(K):
            choose(smallest(nearest, 1))
    else:
        choose(evenly_spaced(padding, EXACT))
        left = K - EXACT
        for rounds in range(ROUNDS, 0, -1):
            m = -(-left // rounds)
            if m == 0:
                break
            candidates = smallest(nearest, min(2 * m, N - K + left))
            novel, kept = nearest.gather(1, candidates), at(features, candidates)
            earlier = torch.ones(novel.shape[1], novel.shape[1], dtype=torch.bool, device=novel.device).tril(-1)
            among = (kept @ kept.mT).masked_fill(~earlier, -CHOSEN).amax(2)  # to the candidates before it
            choose(candidates.gather(1, smallest(torch.maximum(novel, among), m)))
            left -= m
    image = torch.arange(N, device=features.device).expand(B, -1)[chosen].view(B, K) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=features.device).expand(B, -1)
    return torch.cat([prefix, image], dim=1)
