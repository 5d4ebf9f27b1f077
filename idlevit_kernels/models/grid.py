"""What the blocks of pyramids have in common: a grid of tokens, attention that is told more than tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

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
