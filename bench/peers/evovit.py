"""Evo-ViT: "Slow-Fast Token Evolution for Dynamic Vision Transformer".

Xu et al., AAAI 2022, https://arxiv.org/abs/2108.01390. The image tokens with the largest class attention, averaged over
layers, go through the layers of a stage ("slow") beside one representative token, the mean of all others weighted by
that attention; those others are then given what the representative token gained ("fast"). All tokens stay.

As the authors' models do, the average starts with the attention of the 4th of twelve layers alone. Their DeiT leaves
out the representative token and classifies by the mean of the tokens; here it is as in the paper, and the model's own
classifier stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .vit import Peer, attend, attention, class_attention, gather, mlp, queries_keys_values, with_class_token

ALPHA = 0.5  # equation 3: share of the attention of the layers before


class EvoViT(Peer):
    """
    Args:
        model: timm VisionTransformer.
        keep_ratio: r; int(r N) image tokens are slow, chosen before the 5th and before the 9th of twelve layers, as the
            authors' layer-to-stage training leaves it.
    """

    def __init__(self, model: Any, keep_ratio: float):
        super().__init__(model)
        if len(model.blocks) < 3:
            raise ValueError(f"EvoViT: model must have at least 3 layers, got {len(model.blocks)}")
        self.keep_ratio = keep_ratio
        self.third = len(model.blocks) // 3

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        blocks = list(self.model.blocks)
        num_keep = max(1, int(self.keep_ratio * (x.shape[1] - 1)))
        if num_keep == x.shape[1] - 1:
            for block in blocks:
                x = mlp(block, attention(block, x))
            return self.classify(x)
        for block in blocks[: self.third - 1]:
            x = mlp(block, attention(block, x))
        x, importance = slow(blocks[self.third - 1], x)
        x, importance = slow_fast(blocks[self.third : 2 * self.third], x, importance, num_keep)
        x, _ = slow_fast(blocks[2 * self.third :], x, importance, num_keep)
        return self.classify(x)


def slow(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block on all tokens [B, n, C], and its class attention [B, n - 1]."""
    q, k, v = queries_keys_values(block.attn, block.norm1(x))
    return mlp(block, x + attend(block, q, k, v)), class_attention(block.attn, q, k)


def slow_fast(stage: Sequence[nn.Module], x: Tensor, importance: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """A stage on tokens [B, T, C] whose global class attention is ``importance`` [B, T - 1]; both come back updated."""
    kept = importance.topk(num_keep, sorted=False).indices
    indices = with_class_token(kept)
    weights = importance.scatter(1, kept, 0.0)  # the slow tokens have no part in the representative one
    representative = (weights / weights.sum(1, keepdim=True)).unsqueeze(1) @ x[:, 1:]
    slow_importance = importance.gather(1, kept)
    y = torch.cat([gather(x, indices), representative], dim=1)
    for block in stage:
        y, attended = slow(block, y)
        slow_importance = ALPHA * slow_importance + (1 - ALPHA) * attended[:, :num_keep]
    x = x + (y[:, -1:] - representative)  # fast: the residuals of all layers of the stage
    x = x.scatter(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]), y[:, :-1])
    return x, importance.scatter(1, kept, slow_importance)
