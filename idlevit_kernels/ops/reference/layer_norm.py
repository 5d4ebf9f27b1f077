"""LayerNorm as the fused ops define it: statistics in the accumulate type."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..dtypes import accumulate_dtype


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis; the result has the accumulate type, not yet rounded to ``x.dtype``."""
    acc = accumulate_dtype(x.dtype)
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    return F.layer_norm(x.to(acc), x.shape[-1:], weight, bias, eps)
