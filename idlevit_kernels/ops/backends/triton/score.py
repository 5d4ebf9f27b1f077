"""token_scores: LayerNorm and the dot product with the direction, in one pass over x."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import accumulate_dtype
from .launch import STREAM_PROGRAMS, contiguous_channels, launch, row_tile, walk
from .rows import center_rows, own_rows, parameter, tile_offsets, widen


@triton.jit(do_not_specialize=["T", "steps"])
def _token_scores(
    x,  # [B, T, C], channels contiguous
    direction,  # [B, C]
    weight,  # [C] or None
    bias,  # [C] or None
    scores,  # [B, T]
    T,
    steps,
    batch_stride,
    token_stride,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, first = own_rows(T, steps, ROWS)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    dtype: tl.constexpr = scores.dtype.element_ty
    u = tl.load(direction + image * C + columns, mask=in_row, other=0.0).to(dtype)
    scaled = u * parameter(weight, columns, in_row, 1.0, dtype)
    # sum_c (normed_c w_c + b_c) u_c: the bias adds one constant per image.
    constant = tl.sum(u * parameter(bias, columns, in_row, 0.0, dtype), 0)
    for step in range(steps):
        tokens = first + step * ROWS + tl.arange(0, ROWS)
        offsets = tile_offsets(image, tokens, columns, batch_stride, token_stride)
        row = widen(tl.load(x + offsets, mask=(tokens < T)[:, None] & in_row[None, :], other=0.0))
        centered, rstd = center_rows(row, in_row, C, EPS)
        result = rstd * tl.sum(centered * scaled[None, :], 1) + constant
        tl.store(scores + image * T + tokens, result, mask=tokens < T)


def token_scores(
    x: Tensor, direction: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    x, direction = contiguous_channels(x), direction.contiguous()
    norm_weight, norm_bias = (None if p is None else p.contiguous() for p in (norm_weight, norm_bias))
    B, T, C = x.shape
    scores = x.new_empty((B, T), dtype=accumulate_dtype(x.dtype))
    tile = row_tile(C, x.dtype)
    steps, programs = walk(B, T, tile["ROWS"], STREAM_PROGRAMS)
    launch(
        _token_scores, programs, x.device,
        x, direction, norm_weight, norm_bias, scores, T, steps, x.stride(0), x.stride(1), EPS=eps, **tile,
    )  # fmt: skip
    return scores
