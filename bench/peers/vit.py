"""What the peers share: timm's VisionTransformer taken apart where the methods differ.

Linears and MLPs run as those of IdleViT do (oneDNN on a CPU in float32), so a comparison is of methods alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idlevit_kernels.block.context import Context
from idlevit_kernels.block.linear import linear as fast_linear
from idlevit_kernels.block.parts import Parts, find_parts


class Peer(nn.Module):
    """Inference around a timm VisionTransformer with a class token, whose weights are shared and not changed."""

    def __init__(self, model: Any):
        super().__init__()
        if getattr(model, "num_prefix_tokens", 0) != 1 or not getattr(model, "has_class_token", False):
            raise TypeError(f"{type(self).__name__}: model must be a VisionTransformer with a class token alone")
        self.model = model
        quarter = len(model.blocks) // 4
        self.stages = (quarter, 2 * quarter, 3 * quarter)  # where methods with three stages drop tokens

    def embed(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, C], the class token first."""
        model: Any = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))

    def classify(self, x: Tensor) -> Tensor:
        model: Any = self.model
        return model.forward_head(model.norm(x))


def linear(x: Tensor, layer: Any) -> Tensor:
    return fast_linear(x, layer.weight, layer.bias)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, C] -> [B, H, n, C / H]"""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def queries_keys_values(attn: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each [B, H, n, head_dim]."""
    q, k, v = (split_heads(t, attn.num_heads) for t in linear(normed, attn.qkv).chunk(3, dim=2))
    return attn.q_norm(q), attn.k_norm(k), v


def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The attention branch, projected: [B, n, C]. ``bias`` is added to the logits, [B, 1, 1, n]."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return block.ls1(linear(block.attn.norm(out.transpose(1, 2).flatten(2)), block.attn.proj))


def class_attention(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    """The class token's attention to all other tokens, mean over heads: [B, n - 1].

    Where a method reads no more of the attention map, only this row is made, and ``attend`` takes fused attention.
    """
    return (q[:, :, :1] * attn.scale @ k.transpose(2, 3)).softmax(-1)[:, :, 0, 1:].mean(1)


def parts_of(block: Any) -> Parts:
    found = find_parts(block)
    assert isinstance(found, Parts), found
    return found


def attention(block: Any, x: Tensor) -> Tensor:
    return x + block.ls1(parts_of(block).attention(block.norm1(x), Context.NOTHING))


def mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.ls2(parts_of(block).mlp(block.norm2(x)))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """[B, T, C] at [B, n] -> [B, n, C]"""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def with_class_token(kept: Tensor) -> Tensor:
    """Indices among the image tokens [B, K] -> indices among all, the class token's first [B, 1 + K]."""
    return torch.cat([kept.new_zeros(kept.shape[0], 1), kept + 1], dim=1)
