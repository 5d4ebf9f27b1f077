"""scatter_tokens, scatter_add_tokens and expand_tokens, copying and in place.

An index outside [0, T) acts as the nearest valid one in place, and names no row where a new tensor is written. Indices
that do not ascend give rows of other tokens; nothing outside the tensors is read or written.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import SEARCH_PROGRAMS, STREAM_PROGRAMS, contiguous_channels, halvings, launch, row_tile, walk
from .rows import add_branch, branch_factor, dense_offsets, find_slots, first_slot, load_tokens, own_rows, tile_offsets


@triton.jit(do_not_specialize=["T", "n", "halvings", "steps"])
def _scatter_tokens(
    x,  # [B, T, C], channels contiguous; None for zeros
    indices,  # [B, n]
    tokens,  # [B, n, C]
    branch,  # [B, n, C] or None
    gamma,  # [C] or None
    out,  # [B, T, C]
    T,
    n,
    halvings,
    steps,
    batch_stride,
    token_stride,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes every row of out once, and reads of x only the rows that stay."""
    image, first = own_rows(T, steps, ROWS)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    dtype: tl.constexpr = out.dtype.element_ty
    factor = branch_factor(gamma, columns, in_row, SCALE, dtype)
    indices += image * n
    slot = first_slot(indices, first, T, n, halvings)
    for step in range(steps):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        kept, slots = find_slots(indices, rows, slot, n, ROWS)
        slot += tl.sum(kept.to(tl.int32), 0)
        moved = kept[:, None] & in_row[None, :]
        compact = dense_offsets(image, slots, columns, n, C)
        mask = (rows < T)[:, None] & in_row[None, :]
        if x is None:
            row = tl.load(tokens + compact, mask=moved, other=0.0)
        else:
            # One load with the address chosen, rather than two loads with the values chosen.
            source = tile_offsets(image, rows, columns, batch_stride, token_stride)
            row = tl.load(tl.where(kept[:, None], tokens + compact, x + source), mask=mask, other=0.0)
        if branch is not None:
            added = add_branch(row, tl.load(branch + compact, mask=moved, other=0.0), factor, dtype)
            row = tl.where(kept[:, None], added, row)  # the other rows stay bit for bit, -0 and NaN included
        tl.store(out + dense_offsets(image, rows, columns, T, C), row, mask=mask)


@triton.jit(do_not_specialize=["T", "n", "steps"])
def _scatter_tokens_in_place(
    x,  # [B, T, C], channels contiguous
    indices,  # [B, n]
    tokens,  # [B, n, C]
    branch,  # [B, n, C] or None
    gamma,  # [C] or None
    T,
    n,
    steps,
    batch_stride,
    token_stride,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, first = own_rows(n, steps, ROWS)
    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    dtype: tl.constexpr = x.dtype.element_ty
    factor = branch_factor(gamma, columns, in_row, SCALE, dtype)
    for step in range(steps):
        slots = first + step * ROWS + tl.arange(0, ROWS)
        token = load_tokens(indices + image * n, slots, n, T)
        mask = (slots < n)[:, None] & in_row[None, :]
        compact = dense_offsets(image, slots, columns, n, C)
        row = tl.load(tokens + compact, mask=mask, other=0.0)
        if branch is not None:
            row = add_branch(row, tl.load(branch + compact, mask=mask, other=0.0), factor, dtype)
        tl.store(x + tile_offsets(image, token, columns, batch_stride, token_stride), row, mask=mask)


def _scatter(
    x: Tensor | None,
    indices: Tensor,
    tokens: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    num_tokens: int,
) -> Tensor:
    x = None if x is None else contiguous_channels(x)
    indices, tokens = indices.contiguous(), tokens.contiguous()
    branch, gamma = (None if t is None else t.contiguous() for t in (branch, gamma))
    B, n, C = tokens.shape
    out = (tokens if x is None else x).new_empty((B, num_tokens, C))
    tile = row_tile(C, tokens.dtype)
    steps, programs = walk(B, num_tokens, tile["ROWS"], SEARCH_PROGRAMS)
    batch_stride, token_stride = (0, 0) if x is None else (x.stride(0), x.stride(1))
    launch(
        _scatter_tokens, programs, out.device,
        x, indices, tokens, branch, gamma, out, num_tokens, n, halvings(num_tokens, n), steps, batch_stride,
        token_stride, SCALE=scale, **tile,
    )  # fmt: skip
    return out


def _scatter_in_place(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor | None, gamma: Tensor | None, scale: float
) -> None:
    target = contiguous_channels(x)
    indices, tokens = indices.contiguous(), tokens.contiguous()
    branch, gamma = (None if t is None else t.contiguous() for t in (branch, gamma))
    B, n, C = tokens.shape
    tile = row_tile(C, tokens.dtype)
    steps, programs = walk(B, n, tile["ROWS"], STREAM_PROGRAMS)
    launch(
        _scatter_tokens_in_place, programs, x.device,
        target, indices, tokens, branch, gamma, x.shape[1], n, steps, target.stride(0), target.stride(1), SCALE=scale,
        **tile,
    )  # fmt: skip
    if target is not x:
        x.copy_(target)


def scatter_tokens(x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    return _scatter(x, indices, tokens, None, None, 1.0, x.shape[1])


def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    _scatter_in_place(x, indices, tokens, None, None, 1.0)


def expand_tokens(tokens: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    return _scatter(None, indices, tokens, None, None, 1.0, num_tokens)


def scatter_add_tokens(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> Tensor:
    return _scatter(x, indices, tokens, branch, gamma, scale, x.shape[1])


def scatter_add_tokens_(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> None:
    _scatter_in_place(x, indices, tokens, branch, gamma, scale)
