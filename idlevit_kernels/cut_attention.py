"""Attention among the kept tokens in training, with the token cut loss over all tokens (arXiv 2310.05654, section 3.3).

The loss needs queries and keys of every token, so the kept ones are gathered from those; values are projected for kept
tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .dense import plain_linear
from .errors import value_error
from .reference.token_cut_loss import ROW_WEIGHTS
from .scoring import rotate


def check_cut(op: str, attn: Any, cut: str) -> None:
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention

    if cut not in ROW_WEIGHTS:
        raise value_error(op, "cut", f"one of {list(ROW_WEIGHTS)}", cut)
    known = (Attention.forward, AttentionRope.forward, EvaAttention.forward)
    if cut != "none" and getattr(type(attn), "forward", None) not in known:
        kind = type(attn).__name__
        raise TypeError(f"{op}: block.attn must be timm's Attention where cut is {cut!r}, got {kind}; use cut='none'")


def _project(attn: Any, x: Tensor, kept: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of all tokens [B, T, A], values of the kept ones [B, n, A]."""
    qkv = getattr(attn, "qkv", None)
    if qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(kept)
    bias = qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:  # of timm's EvaAttention
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if plain_linear(qkv):
        width = qkv.weight.shape[0] // 3
        weights = qkv.weight.split((2 * width, width))
        biases = (None, None) if bias is None else bias.split((2 * width, width))
        q, k = F.linear(x, weights[0], biases[0]).chunk(2, dim=-1)
        return q, k, F.linear(kept, weights[1], biases[1])
    projected = qkv(x) if bias is qkv.bias else qkv(x) + bias
    q, k, v = projected.chunk(3, dim=-1)
    return q, k, ops.gather_tokens(v, indices, backend=backend)


def cut_attention(
    attn: Any, x: Tensor, indices: Tensor, num_prefix_tokens: int, kind: str, backend: str, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``attn(gather_tokens(x, indices))`` [B, n, C] and the token cut loss; x is normalised, [B, T, C].

    With a rotary embedding of all image tokens, queries and keys are the rotated ones.
    """
    kept = ops.gather_tokens(x, indices, backend=backend)
    heads: int = attn.num_heads
    q, k, v = _project(attn, x, kept, indices, backend)
    head_dim = q.shape[2] // heads

    def by_head(t: Tensor) -> Tensor:  # [B, T, A] -> [B, H, T, head_dim]
        return t.unflatten(2, (-1, head_dim)).transpose(1, 2)

    def normed(t: Tensor, norm: nn.Module) -> Tensor:
        if type(norm) is nn.Identity and rope is None:
            return t
        t = norm(by_head(t))
        return (t if rope is None else rotate(t, rope, attn)).transpose(1, 2).flatten(2)

    q, k = normed(q, attn.q_norm), normed(k, attn.k_norm)
    if k.shape[2] != q.shape[2]:  # several heads of queries share one of keys and values
        groups = q.shape[2] // k.shape[2]
        k, v = (t.unflatten(2, (-1, head_dim)).repeat_interleave(groups, 2).flatten(2) for t in (k, v))
    loss, _, _ = ops.token_cut_loss(q, k, indices, attn.scale / heads, num_prefix_tokens, kind, backend=backend)

    q, k = (ops.gather_tokens(t, indices, backend=backend) for t in (q, k))
    q, k, v = by_head(q), by_head(k), by_head(v)
    if attn.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        y = attn.attn_drop((attn.scale * q @ k.mT).softmax(-1)) @ v
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(kept).sigmoid()
    return attn.proj_drop(attn.proj(y)), loss
