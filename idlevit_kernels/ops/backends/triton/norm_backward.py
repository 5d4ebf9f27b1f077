"""gather_norm_backward: the backward of LN(x[indices]), scattered into zeros, in one pass."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import accumulate_dtype
from .launch import SEARCH_PROGRAMS, contiguous_channels, halvings, launch, row_tile, walk
from .rows import center_rows, dense_offsets, find_slots, first_slot, own_rows, parameter, tile_offsets, widen


@triton.jit(do_not_specialize=["T", "n", "halvings", "steps"])
def _gather_norm_backward(
    grad,  # [B, n, C]
    x,  # [B, T, C], channels contiguous
    indices,  # [B, n]
    weight,  # [C] or None
    grad_x,  # [B, T, C]
    partial,  # [2, programs, C]: sums of the weight's and the bias's gradient
    T,
    n,
    halvings,
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
    dtype: tl.constexpr = partial.dtype.element_ty
    w = parameter(weight, columns, in_row, 1.0, dtype)
    grad_weight = tl.zeros([ROWS, BLOCK_C], dtype)
    grad_bias = tl.zeros([ROWS, BLOCK_C], dtype)
    indices += image * n
    slot = first_slot(indices, first, T, n, halvings)
    for step in range(steps):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        kept, slots = find_slots(indices, rows, slot, n, ROWS)
        slot += tl.sum(kept.to(tl.int32), 0)
        # Rows that are not kept read zeros, so their gradient comes out as zero.
        moved = kept[:, None] & in_row[None, :]
        source = tile_offsets(image, rows, columns, batch_stride, token_stride)
        row = widen(tl.load(x + source, mask=moved, other=0.0))
        g = tl.load(grad + dense_offsets(image, slots, columns, n, C), mask=moved, other=0.0).to(dtype)
        centered, rstd = center_rows(row, in_row, C, EPS)
        normed = centered * rstd[:, None]
        grad_weight += g * normed
        grad_bias += g
        # d LN: remove from the gradient its mean and its component along the normalised row.
        scaled = g * w[None, :]
        mean = tl.sum(scaled, 1) * (1.0 / C)
        along = tl.sum(scaled * normed, 1) * (1.0 / C)
        grad_row = rstd[:, None] * (scaled - mean[:, None] - normed * along[:, None])
        mask = (rows < T)[:, None] & in_row[None, :]
        target = grad_x + dense_offsets(image, rows, columns, T, C)
        tl.store(target, grad_row.to(grad_x.dtype.element_ty), mask=mask)
    # One row of sums a program, added up by PyTorch: the order is fixed, so the gradient is too.
    program = tl.program_id(0).to(tl.int64)
    tl.store(partial + program * C + columns, tl.sum(grad_weight, 0), mask=in_row)
    partial += tl.num_programs(0).to(tl.int64) * C
    tl.store(partial + program * C + columns, tl.sum(grad_bias, 0), mask=in_row)


def gather_norm_backward(
    grad: Tensor, x: Tensor, indices: Tensor, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, indices = grad.contiguous(), contiguous_channels(x), indices.contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    (B, T, C), n = x.shape, indices.shape[1]
    tile = row_tile(C, x.dtype)
    steps, programs = walk(B, T, tile["ROWS"], SEARCH_PROGRAMS)
    grad_x = x.new_empty((B, T, C))
    partial = x.new_empty((2, programs, C), dtype=accumulate_dtype(x.dtype))
    launch(
        _gather_norm_backward, programs, x.device,
        grad, x, indices, norm_weight, grad_x, partial, T, n, halvings(T, n), steps, x.stride(0), x.stride(1), EPS=eps,
        **tile,
    )  # fmt: skip
    grad_weight, grad_bias = partial
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)
