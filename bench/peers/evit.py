"""EViT: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations".

Liang et al., ICLR 2022, https://arxiv.org/abs/2202.07800. In three layers, after attention, the image tokens that the
class token attends to most stay; all others become one token, their sum weighted by that attention (equation 3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .vit import Peer, attend, attention, class_attention, gather, mlp, queries_keys_values


class EViT(Peer):
    """
    Args:
        model: timm VisionTransformer.
        keep_rate: share of the image tokens (a fused one counts) that stay, in the 4th, 7th and 10th of twelve layers.
    """

    def __init__(self, model: Any, keep_rate: float):
        super().__init__(model)
        self.keep_rate = keep_rate

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for i, block in enumerate(self.model.blocks):
            if i in self.stages and self.keep_rate < 1:
                x = mlp(block, self.attend_and_fuse(block, x))
            else:
                x = mlp(block, attention(block, x))
        return self.classify(x)

    def attend_and_fuse(self, block: Any, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, 1 + K + 1, C]: the class token, the attentive tokens, the fused token."""
        q, k, v = queries_keys_values(block.attn, block.norm1(x))
        attentiveness = class_attention(block.attn, q, k)
        x = x + attend(block, q, k, v)
        num_keep = math.ceil(self.keep_rate * attentiveness.shape[1])
        kept = attentiveness.topk(num_keep, sorted=False).indices
        others = attentiveness.scatter(1, kept, 0.0)  # the attentive tokens have no part in the sum
        fused = others.unsqueeze(1) @ x[:, 1:]
        return torch.cat([x[:, :1], gather(x[:, 1:], kept), fused], dim=1)
