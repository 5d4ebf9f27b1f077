"""What several backward passes share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in the accumulate type."""
    acc, shape = accumulate_dtype(x.dtype), x.shape[-1:]
    x, grad = x.to(acc), grad.to(acc)
    weight = x.new_ones(shape) if weight is None else weight.to(acc)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, None, eps)
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, weight, [True, True, True])
