"""Idle tokens that follow, dense and without the ops: what the compact form must equal. The sister of ``masked_form``.

Membership is a 0/1 matrix M [B, n, T], one row a representative: means are M x / size, the way back is M^T change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .select_spread import select_spread


def membership(features: Tensor, indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Features [B, N, d] and the representatives' indices [B, n] -> [B, n, T]: 1 where a token belongs."""
    B, N, _ = features.shape
    P, T = num_prefix_tokens, num_prefix_tokens + N
    similarity = features.new_full((B, T, T), -2.0)
    similarity[:, P:, P:] = features @ features.mT
    everything = torch.eye(T, dtype=torch.bool, device=features.device)
    similarity = similarity.masked_fill(everything, 2.0)  # to itself: before all others
    chosen = torch.zeros((B, T), dtype=torch.bool, device=features.device).scatter_(1, indices, True)
    best = similarity.masked_fill(~chosen.unsqueeze(1), -torch.inf).argmax(2)  # [B, T], the index of a token
    return (indices.unsqueeze(2) == best.unsqueeze(1)).to(features.dtype)


def follow_block(
    x: Tensor, block: Any, num_keep: int, num_prefix_tokens: int, projection: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # tokens [B, T, C], indices [B, n], membership [B, n, T]
    attn = block.attn
    B, _, _ = x.shape
    with torch.no_grad():
        features = F.normalize(block.norm1(x[:, num_prefix_tokens:]) @ projection.to(x.dtype), dim=-1)
        indices = select_spread(features, num_keep, num_prefix_tokens, None)
        member = membership(features, indices, num_prefix_tokens)
    size = member.sum(2, keepdim=True)  # [B, n, 1]
    y = member @ x / size
    qkv = attn.qkv(block.norm1(y)).reshape(B, y.shape[1], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]  # each [B, H, n, head_dim]
    logits = attn.scale * q @ k.mT + size.log().mT.unsqueeze(1)  # each key counts as its group
    branch = attn.norm((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, y.shape[1], -1))
    change1 = block.drop_path1(block.ls1(attn.proj(branch)))
    change2 = block.drop_path2(block.ls2(block.mlp(block.norm2(y + change1))))
    return x + member.mT @ (change1 + change2), indices, member


def weight_projection(block: Any, dims: int) -> Tensor:  # [C, dims]
    """The directions that queries, keys and values read most: leading right singular vectors of W_qkv."""
    return torch.linalg.svd(block.attn.qkv.weight.detach(), full_matrices=False).Vh[:dims].T.contiguous()


def follow_form(model: Any, images: Tensor, counts: Sequence[int], projections: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """A dense timm VisionTransformer whose layers compute ``counts`` representatives each (all tokens: dense).

    Returns its logits and all normalised tokens [B, T, C].
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    P = model.num_prefix_tokens
    for block, num_keep, projection in zip(model.blocks, counts, projections, strict=True):
        x = block(x) if num_keep == x.shape[1] - P else follow_block(x, block, num_keep, P, projection)[0]
    x = model.norm(x)
    return model.forward_head(x), x
