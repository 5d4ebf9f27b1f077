"""gather_tokens and gather_add_norm: the kept rows into a compact buffer. An index outside [0, T) acts as the nearest
valid one."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import STREAM_PROGRAMS, contiguous_channels, launch, row_tile, walk
from .rows import (
    add_branch,
    branch_factor,
    dense_offsets,
    load_tokens,
    normalize_rows,
    own_rows,
    parameter,
    tile_offsets,
    widen,
)


@triton.jit(do_not_specialize=["T", "n", "steps"])
def _gather_tokens(
    x,  # [B, T, C], channels contiguous
    indices,  # [B, n]
    out,  # [B, n, C]
    T,
    n,
    steps,
    batch_stride,
    token_stride,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, first = own_rows(n, steps, ROWS)
    columns = tl.arange(0, BLOCK_C)
    for step in range(steps):
        slots = first + step * ROWS + tl.arange(0, ROWS)
        token = load_tokens(indices + image * n, slots, n, T)
        mask = (slots < n)[:, None] & (columns < C)[None, :]
        row = tl.load(x + tile_offsets(image, token, columns, batch_stride, token_stride), mask=mask, other=0.0)
        tl.store(out + dense_offsets(image, slots, columns, n, C), row, mask=mask)


@triton.jit(do_not_specialize=["T", "n", "steps"])
def _gather_add_norm(
    x,  # [B, T, C], channels contiguous
    indices,  # [B, n]
    branch,  # [B, n, C]
    gamma,  # [C] or None
    weight,  # [C] or None
    bias,  # [C] or None
    tokens,  # [B, n, C]
    normed,  # [B, n, C]
    T,
    n,
    steps,
    batch_stride,
    token_stride,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, first = own_rows(n, steps, ROWS)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    stored_type: tl.constexpr = tokens.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if stored_type == tl.float64 else tl.float32
    factor = branch_factor(gamma, columns, in_row, SCALE, stored_type)
    w = parameter(weight, columns, in_row, 1.0, dtype)
    b = parameter(bias, columns, in_row, 0.0, dtype)
    for step in range(steps):
        slots = first + step * ROWS + tl.arange(0, ROWS)
        token = load_tokens(indices + image * n, slots, n, T)
        mask = (slots < n)[:, None] & in_row[None, :]
        compact = dense_offsets(image, slots, columns, n, C)
        row = tl.load(x + tile_offsets(image, token, columns, batch_stride, token_stride), mask=mask, other=0.0)
        added = tl.load(branch + compact, mask=mask, other=0.0)
        stored = add_branch(row, added, factor, stored_type)
        tl.store(tokens + compact, stored, mask=mask)
        # The norm sees the tokens as stored: they are what the block's second residual adds to.
        result = normalize_rows(widen(stored), w, b, in_row, C, EPS)
        tl.store(normed + compact, result.to(stored_type), mask=mask)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    x, indices = contiguous_channels(x), indices.contiguous()
    (B, n), (_, T, C) = indices.shape, x.shape
    out = x.new_empty((B, n, C))
    tile = row_tile(C, x.dtype)
    steps, programs = walk(B, n, tile["ROWS"], STREAM_PROGRAMS)
    launch(_gather_tokens, programs, x.device, x, indices, out, T, n, steps, x.stride(0), x.stride(1), **tile)
    return out


def gather_add_norm(
    x: Tensor,
    indices: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x, indices, branch = contiguous_channels(x), indices.contiguous(), branch.contiguous()
    gamma, norm_weight, norm_bias = (None if p is None else p.contiguous() for p in (gamma, norm_weight, norm_bias))
    (B, n), (_, T, C) = indices.shape, x.shape
    tokens, normed = x.new_empty((B, n, C)), x.new_empty((B, n, C))
    # Of half types too, the assembler spills a register for the sake of one program more (Triton 3.6, 10.0).
    tile = {"maxnreg": 72} | row_tile(C, x.dtype)
    steps, programs = walk(B, n, tile["ROWS"], STREAM_PROGRAMS)
    launch(
        _gather_add_norm, programs, x.device,
        x, indices, branch, gamma, norm_weight, norm_bias, tokens, normed, T, n, steps, x.stride(0), x.stride(1),
        SCALE=scale, EPS=eps, **tile,
    )  # fmt: skip
    return tokens, normed
