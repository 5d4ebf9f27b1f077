"""ToMe: "Token Merging: Your ViT But Faster".

Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461. In each layer, between attention and MLP, the r pairs of
tokens with the most similar keys merge into their mean, weighted by how many patches each stands for; attention counts
a token as often as it stands for a patch ("proportional attention", equation 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import Peer, attend, gather, mlp, queries_keys_values


class ToMe(Peer):
    """
    Args:
        model: timm VisionTransformer.
        r: tokens that merge in each layer, on average: of a fraction the first layers merge one more.
    """

    def __init__(self, model: Any, r: float):
        super().__init__(model)
        depth = len(model.blocks)
        total = round(r * depth)
        self.r = total / depth
        each, more = divmod(total, depth)
        self.merges = [each + (i < more) for i in range(depth)]

    def forward(self, image: Tensor) -> Tensor:
        x, size = self.embed(image), None
        for block, r in zip(self.model.blocks, self.merges, strict=True):
            q, k, v = queries_keys_values(block.attn, block.norm1(x))
            bias = None if size is None else size.log()[:, None, None, :, 0]
            x = x + attend(block, q, k, v, bias)
            r = min(r, (x.shape[1] - 1) // 2)
            if r > 0:
                x, size = merge(x, size, k.mean(1), r)
            x = mlp(block, x)
        return self.classify(x)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: tokens at even places (A) propose to those at odd places (B).

    Each token of A draws an edge to the token of B with the most similar metric; the r best edges merge. The class
    token is the first of A and never merges.

    Args:
        x: [B, T, C].
        size: patches that each token stands for, [B, T, 1]; None for one each.
        metric: keys, mean over heads [B, T, D].

    Returns:
        x [B, T - r, C], the class token first, and size [B, T - r, 1].
    """
    size = torch.ones_like(x[:, :, :1]) if size is None else size
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, A, B]
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=1, descending=True)
    merged = order[:, :r]
    stays = order[:, r:].sort(dim=1).values  # the class token first
    partner = partner.gather(1, merged)

    # The size rides along as one more channel of the weighted sum.
    weighted = torch.cat([x * size, size], dim=2)
    a, b = weighted[:, ::2], weighted[:, 1::2]
    b = b.scatter_add(1, partner.unsqueeze(-1).expand(-1, -1, b.shape[2]), gather(a, merged))
    weighted = torch.cat([gather(a, stays), b], dim=1)
    size = weighted[:, :, -1:]
    return weighted[:, :, :-1] / size, size
