"""What the blocks of pyramids have in common: a grid of tokens, attention that is told more than tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block.parts import find_kind, own_forward
from ..versions import changed_forward


def why_no_attention(attn: Any, name: str) -> str | None:
    """Why this is not the attention ``name`` whose formula is written out for the kept tokens; None if it is.

    Its own forward cannot be called on them: it wants a whole grid.
    """
    kind = find_kind(name)
    if type(attn) is not kind:
        return f"its attention is {type(attn).__name__}, which is not timm's {getattr(kind, '__name__', name)}"
    if "forward" in attn.__dict__ or not own_forward(type(attn)) or changed_forward(type(attn), name):
        return f"its attention, {type(attn).__name__}, has another forward, which cannot be given the kept tokens alone"
    return None


def through_hooks(module: nn.Module, formula: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """``formula(y)`` as if it were the module's forward: its hooks see the call, with the kept tokens y alone, of an
    object that has all that lies on the module."""
    stand_in = type(type(module).__name__, (type(module),), {"forward": lambda _, y: formula(y)})
    called: Any = object.__new__(stand_in)
    called.__dict__ = module.__dict__
    return called(y)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    softmax: Any,
    drop: Any,
) -> Tensor:
    """[B, H, K, head_dim] each, mask [B or 1, H, K, keys] -> [B, K, C].

    ``softmax`` and ``drop``: modules that somebody watches, or None.
    """
    if softmax is None and drop is None:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        return out.transpose(1, 2).flatten(2)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    weights = query * scale @ key.transpose(-2, -1)
    weights = weights if mask is None else weights + mask
    weights = weights.softmax(-1) if softmax is None else softmax(weights)
    weights = torch.dropout(weights, dropout, dropout > 0) if drop is None else drop(weights)
    return (weights @ value).transpose(1, 2).flatten(2)
