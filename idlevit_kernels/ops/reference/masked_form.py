"""The form that the paper trains (arXiv 2310.05654, section 3), dense: what the compact form must equal.

Attention over all tokens with the keys of idle tokens at -1e5 before the softmax, both branches multiplied by the 0/1
mask, selection by the raw attention logits averaged over heads, and the token cut loss from the stored logits
[B, H, T, T] before any masking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def masked_block(
    x: Tensor, block: Any, num_keep: int, num_prefix_tokens: int, scorer: str
) -> tuple[Tensor, Tensor, Tensor]:  # tokens [B, T, C], logits [B, H, T, T], mask [B, T]
    attn = block.attn
    B, T, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]  # each [B, H, T, head_dim]
    logits = attn.scale * q @ k.transpose(-2, -1)
    scores = logits.mean(1)[:, 0] if scorer == "cls" else logits.mean((1, 2))  # [B, T]
    kept = scores[:, num_prefix_tokens:].topk(num_keep).indices + num_prefix_tokens
    mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
    mask[:, :num_prefix_tokens] = 1.0

    masked = logits.masked_fill(mask[:, None, None, :] == 0, -1e5)
    branch = attn.norm((masked.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
    x = x + mask[..., None] * block.drop_path1(block.ls1(attn.proj(branch)))
    return x + mask[..., None] * block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), logits, mask


def masked_cut_loss(logits: Tensor, mask: Tensor, num_prefix_tokens: int, kind: str) -> Tensor:
    """Logits [B, H, T, T] and mask [B, T] -> a scalar; 1 in the mask is a selected token or a prefix token."""
    attention = logits.mean(1).softmax(-1)  # [B, T, T]
    rows, columns = mask[:, :, None], mask[:, None, :]
    different = (rows - columns).abs()
    different[:, :, :num_prefix_tokens] = 0.0  # prefix tokens are on both sides; only an idle row would count them
    inter = (different * attention).sum(-1).square().mean()
    intra = ((rows * columns * attention).sum(-1) - mask).square().mean()
    return {"both": inter + intra, "inter": inter, "intra": intra, "none": torch.zeros_like(inter)}[kind]


def masked_form(
    model: Any, images: Tensor, schedule: Sequence[float], scorer: str, kind: str = "none"
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A dense timm VisionTransformer, run as the paper trains it.

    Returns its logits, all normalised tokens [B, T, C], the cut loss of each idle layer, the mask of the last [B, T].
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    P, layers = model.num_prefix_tokens, []
    for block, ratio in zip(model.blocks, schedule, strict=True):
        if ratio == 1:
            x = block(x)
        else:
            x, logits, mask = masked_block(x, block, max(1, int(ratio * (x.shape[1] - P))), P, scorer)
            layers.append((logits, mask))
    x = model.norm(x)
    token_cut = torch.stack([masked_cut_loss(logits, mask, P, kind) for logits, mask in layers])
    return model.forward_head(x), x, token_cut, mask
