from __future__ import annotations

from torch import Tensor

from ..dtypes import accumulate_dtype
from ..record import Tolerance, op
from .expand_tokens import expand_tokens
from .gather_tokens import gather_tokens


@op(
    kernels={"triton"},
    composed={"cpu", "cuda"},
    derivative_of="select_gather_norm",
    tolerance=Tolerance(rows=4, stored=2),
    arguments=lambda s: (s.branch, s.x, s.indices, s.norm[0], s.norm[2]),
    bytes_moved=lambda s: s.indices + 2 * s.kept + s.vector + s.image + 2 * s.vector,
)
def gather_norm_backward(
    grad: Tensor,  # [B, n, C], the gradient of LN(x[indices])
    x: Tensor,  # [B, T, C]
    indices: Tensor,  # [B, n]
    norm_weight: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of x [B, T, C], weight [C] and bias [C]
    acc = accumulate_dtype(x.dtype)
    row = gather_tokens(x, indices).to(acc)
    grad = grad.to(acc)
    mean = row.mean(-1, keepdim=True)
    variance = (row - mean).square().mean(-1, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normed = (row - mean) * rstd
    scaled = grad if norm_weight is None else grad * norm_weight.to(acc)
    # d LN: remove from the gradient its mean and its component along the normalised row.
    grad_row = rstd * (scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True))
    grad_x = expand_tokens(grad_row.to(x.dtype), indices, x.shape[1])
    return grad_x, (grad * normed).sum((0, 1)), grad.sum((0, 1))


@gather_norm_backward.fake
def _(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    channels, acc = x.shape[2], accumulate_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(channels, dtype=acc), x.new_empty(channels, dtype=acc)
