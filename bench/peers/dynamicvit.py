"""DynamicViT: "Efficient Vision Transformers with Dynamic Token Sparsification".

Rao et al., NeurIPS 2021, https://arxiv.org/abs/2106.02034. Before three of the layers a small network predicts from
each token and from the mean of all how much the token matters; the best r, r^2 and r^3 of the image tokens stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .vit import Peer, attention, gather, linear, mlp, with_class_token


class Predictor(nn.Module):
    """Section 3.2: local features beside the mean of global ones. [B, N, C] -> log-probability of keeping, [B, N]."""

    def __init__(self, channels: int):
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.norm = nn.LayerNorm(channels)
        self.embed = nn.Linear(channels, channels)
        self.hidden = nn.ModuleList([nn.Linear(channels, half), nn.Linear(half, quarter)])
        self.decide = nn.Linear(quarter, 2)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(linear(self.norm(x), self.embed))
        local, everywhere = x.chunk(2, dim=2)
        x = torch.cat([local, everywhere.mean(1, keepdim=True).expand_as(local)], dim=2)
        for layer in self.hidden:
            x = self.act(linear(x, layer))
        return self.decide(x).log_softmax(-1)[:, :, 0]


class DynamicViT(Peer):
    """
    Args:
        model: timm VisionTransformer.
        keep_ratio: r; int(r^i N) image tokens are left after the i-th predictor. Predictors stand before the 4th, 7th
            and 10th of twelve layers.
    """

    def __init__(self, model: Any, keep_ratio: float):
        super().__init__(model)
        self.keep_ratio = keep_ratio
        like = model.cls_token
        self.predictors = nn.ModuleList(Predictor(model.embed_dim) for _ in self.stages).to(like.device, like.dtype)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        num_image_tokens = x.shape[1] - 1
        for i, block in enumerate(self.model.blocks):
            if i in self.stages:
                stage = self.stages.index(i)
                scores = self.predictors[stage](x[:, 1:])
                kept = scores.argsort(dim=1, descending=True)[
                    :, : int(num_image_tokens * self.keep_ratio ** (stage + 1))
                ]
                x = gather(x, with_class_token(kept))
            x = mlp(block, attention(block, x))
        return self.classify(x)
