from __future__ import annotations

import torch
from torch import Tensor

from ..record import Tolerance, op


@op(
    kernels={"cpu", "cuda", "triton"},
    tolerance=Tolerance(),
    arguments=lambda s: (s.scores, *s.counts),
    bytes_moved=lambda s: s.scores + s.indices,
)
def select_tokens(
    scores: Tensor,  # [B, T]
    num_keep: int,
    num_prefix_tokens: int,
) -> Tensor:  # [B, n] int64, ascending
    image = scores[:, num_prefix_tokens:]
    # Two stable sorts, the less significant key first: NaN last, then scores descending. Ties keep the lower index.
    nan = image.isnan()
    order = nan.to(torch.uint8).argsort(dim=1, stable=True)
    ranked = image.masked_fill(nan, -torch.inf).gather(1, order)
    order = order.gather(1, ranked.argsort(dim=1, descending=True, stable=True))
    kept = order[:, :num_keep].sort(dim=1).values + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([prefix, kept], dim=1)


@select_tokens.fake
def _(scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    return scores.new_empty((scores.shape[0], num_prefix_tokens + num_keep), dtype=torch.int64)
