"""IdleViT in the order of the released inference code (arXiv 2310.05654): the same logits as ``apply_idle`` gives.

LayerNorm and keys of all tokens, the class token's logits, a full sort, gather, attention and MLP of the kept tokens in
the order of their scores, scatter in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from idlevit_kernels import idle_schedule
from idlevit_kernels.block.linear import linear as fast_linear
from idlevit_kernels.schedule import num_kept

from .vit import Peer, attend, attention, gather, mlp, split_heads, with_class_token


class ReleasedIdleViT(Peer):
    """
    Args:
        model: timm VisionTransformer.
        keep_ratio: r; the layers keep ``idle_schedule(depth, r)``.
    """

    def __init__(self, model: Any, keep_ratio: float):
        super().__init__(model)
        self.ratios = idle_schedule(len(model.blocks), keep_ratio)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block, ratio in zip(self.model.blocks, self.ratios, strict=True):
            if ratio == 1:
                x = mlp(block, attention(block, x))
            else:
                x = idle(block, x, num_kept(ratio, x.shape[1] - 1))
        return self.classify(x)


def idle(block: Any, x: Tensor, num_keep: int) -> Tensor:
    """[B, T, C] -> [B, T, C], in place."""
    attn = block.attn
    heads, width = attn.num_heads, attn.qkv.weight.shape[0] // 3
    weight = attn.qkv.weight.split(width)
    bias = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.split(width)
    normed = block.norm1(x)
    k = attn.k_norm(split_heads(fast_linear(normed, weight[1], bias[1]), heads))
    query = attn.q_norm(split_heads(F.linear(normed[:, :1], weight[0], bias[0]), heads))
    scores = (query @ k.transpose(2, 3)).mean(1)[:, 0, 1:]
    indices = with_class_token(scores.argsort(dim=1, descending=True)[:, :num_keep])

    normed = gather(normed, indices)
    q = attn.q_norm(split_heads(fast_linear(normed, weight[0], bias[0]), heads))
    v = split_heads(fast_linear(normed, weight[2], bias[2]), heads)
    kept = indices[:, None, :, None].expand(-1, heads, -1, k.shape[3])
    y = mlp(block, gather(x, indices) + attend(block, q, k.gather(2, kept), v))
    return x.scatter_(1, indices.unsqueeze(-1).expand_as(y), y)
