"""Attention among the kept tokens in training, with the token cut loss over all tokens (arXiv 2310.05654, section 3.3).

The loss needs queries and keys of every token, so the kept ones are gathered from those; values are projected for kept
tokens only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .dense import plain_linear
from .errors import value_error
from .reference.token_cut_loss import ROW_WEIGHTS


def check_cut(op: str, attn: Any, cut: str) -> None:
    from timm.layers import Attention

    if cut not in ROW_WEIGHTS:
        raise value_error(op, "cut", f"one of {list(ROW_WEIGHTS)}", cut)
    if cut != "none" and getattr(type(attn), "forward", None) is not Attention.forward:
        kind = type(attn).__name__
        raise TypeError(f"{op}: block.attn must be timm's Attention where cut is {cut!r}, got {kind}; use cut='none'")


def cut_attention(
    attn: Any, x: Tensor, indices: Tensor, num_prefix_tokens: int, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    """``attn(gather_tokens(x, indices))`` [B, n, C] and the token cut loss; x is normalised, [B, T, C]."""
    kept = ops.gather_tokens(x, indices, backend=backend)
    qkv, heads = attn.qkv, attn.num_heads
    if plain_linear(qkv):
        width = qkv.weight.shape[0] // 3
        weights = qkv.weight.split((2 * width, width))
        biases = (None, None) if qkv.bias is None else qkv.bias.split((2 * width, width))
        q, k = F.linear(x, weights[0], biases[0]).chunk(2, dim=-1)
        v = F.linear(kept, weights[1], biases[1])
    else:
        q, k, v = qkv(x).chunk(3, dim=-1)
        v = ops.gather_tokens(v, indices, backend=backend)
    q, k = (
        t if type(norm) is nn.Identity else norm(t.unflatten(2, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        for t, norm in ((q, attn.q_norm), (k, attn.k_norm))
    )
    loss, _, _ = ops.token_cut_loss(q, k, indices, attn.scale / heads, num_prefix_tokens, kind, backend=backend)

    q, k = (ops.gather_tokens(t, indices, backend=backend) for t in (q, k))
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, n, head_dim]
    if attn.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        y = attn.attn_drop((attn.scale * q @ k.mT).softmax(-1)) @ v
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(kept).sigmoid()
    return attn.proj_drop(attn.proj(y)), loss
