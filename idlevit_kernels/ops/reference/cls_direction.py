from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..record import Shape, Tolerance, op
from .layer_norm import layer_norm


def _macs(x: Shape, norm_weight: Shape, norm_bias: Shape, eps: None, qkv_weight: Shape, qkv_bias: Shape) -> int:
    assert x is not None and qkv_weight is not None
    return 2 * x[0] * x[2] * (qkv_weight[0] // 3)


@op(
    kernels={"cpu"},
    composed={"cuda", "triton"},  # two small matrix products: PyTorch's library has those
    tolerance=Tolerance(rows=4, stored=8),  # two products after a norm, each rounded
    arguments=lambda s: (s.x, *s.norm, s.random(3 * s.case.C, s.case.C), s.random(3 * s.case.C)),
    # LayerNorm of one token an image, its query, and that times the key weights.
    bytes_moved=lambda s: (6 * s.B + 2 + 2 * s.C + 1) * s.vector,
    macs=_macs,
)
def cls_direction(
    x: Tensor,  # [B, T, C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    qkv_weight: Tensor,  # [3A, C]
    qkv_bias: Tensor | None,  # [3A]
) -> Tensor:  # [B, C], dtype of x
    width = qkv_weight.shape[0] // 3
    query_weight, key_weight, _ = qkv_weight.split(width)
    normed = layer_norm(x[:, 0], norm_weight, norm_bias, eps).to(qkv_weight.dtype)
    query = F.linear(normed, query_weight, None if qkv_bias is None else qkv_bias[:width])
    return (query @ key_weight).to(x.dtype)


@cls_direction.fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))
