"""Device functions shared by the kernels: rows of C channels in registers, and the search in ascending indices.

A tile is ``ROWS`` whole rows of ``BLOCK_C`` >= C channels; what is past C is masked and holds zeros.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(value):
    """The value in the accumulate type: float64 for float64, float32 for all others."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def own_rows(rows, steps, ROWS: tl.constexpr):
    """The image that this program works on, and the first of the ``steps`` tiles of ROWS rows that it walks there."""
    programs = tl.cdiv(rows, ROWS * steps)
    return (tl.program_id(0) // programs).to(tl.int64), (tl.program_id(0) % programs) * ROWS * steps


@triton.jit
def tile_offsets(image, rows, columns, batch_stride, row_stride):
    """Offsets [ROWS, BLOCK_C] of an image's rows, which lie apart; ``image`` has 64 bits."""
    return (image * batch_stride + rows.to(tl.int64) * row_stride)[:, None] + columns[None, :]


@triton.jit
def dense_offsets(image, rows, columns, count, C: tl.constexpr):
    """Offsets [ROWS, BLOCK_C] of an image's rows in a contiguous tensor [B, count, C]; ``image`` has 64 bits."""
    return ((image * count + rows) * C)[:, None] + columns[None, :]


@triton.jit
def parameter(vector, columns, in_row, default: tl.constexpr, dtype: tl.constexpr):
    """A parameter vector [C] in the accumulate type; the default where there is none."""
    if vector is None:
        return tl.full(columns.shape, default, dtype)
    else:
        return tl.load(vector + columns, mask=in_row, other=0.0).to(dtype)


@triton.jit
def center_rows(row, in_row, C: tl.constexpr, EPS: tl.constexpr):
    """row - mean [ROWS, BLOCK_C], zero past C, and 1 / standard deviation [ROWS]."""
    mean = tl.sum(row, 1) * (1.0 / C)
    centered = tl.where(in_row[None, :], row - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) * (1.0 / C)
    return centered, tl.rsqrt(variance + EPS)


@triton.jit
def normalize_rows(row, weight, bias, in_row, C: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm [ROWS, BLOCK_C] of rows in the accumulate type."""
    centered, rstd = center_rows(row, in_row, C, EPS)
    return centered * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def branch_factor(gamma, columns, in_row, SCALE: tl.constexpr, dtype: tl.constexpr):
    """SCALE * gamma in the accumulate type of the dtype."""
    return SCALE * parameter(gamma, columns, in_row, 1.0, tl.float64 if dtype == tl.float64 else tl.float32)


@triton.jit
def add_branch(tokens, branch, factor, dtype: tl.constexpr):
    """tokens + factor * branch, rounded once to the dtype that is stored."""
    tokens = widen(tokens)
    return (tokens + factor[None, :] * branch.to(tokens.dtype)).to(dtype)


@triton.jit
def load_tokens(indices, slots, n, T):
    """The tokens in the slots, of n indices. A wrong index becomes the nearest token: no address outside the tensor."""
    return tl.minimum(tl.maximum(tl.load(indices + slots, mask=slots < n, other=0), 0), T - 1).to(tl.int32)


@triton.jit
def first_slot(indices, token, T, n, halvings):
    """The slot of the first index >= token.

    n ascending indices below T leave a window of T - n + 1 slots for it, which ``halvings`` steps narrow down to one.
    Their number comes from the host: a loop whose end depends on loaded data makes the compiler spill its state.
    """
    low = tl.maximum(token - (T - n), 0)
    high = tl.minimum(token, n)
    for _ in range(halvings):
        middle = (low + high) // 2
        below = tl.load(indices + middle, mask=low < high, other=token) < token
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def find_slots(indices, tokens, slot, n, ROWS: tl.constexpr):
    """Which of ROWS consecutive tokens are kept, and in which slot, where ``slot`` is the first that can hold one."""
    slots = slot + tl.arange(0, ROWS)
    entries = tl.load(indices + slots, mask=slots < n, other=-1)
    match = entries[None, :] == tokens[:, None]  # [ROWS tokens, ROWS slots]
    kept = tl.sum(match.to(tl.int32), 1) > 0
    # The largest, not the sum: of an index that comes twice, by mistake, the sum would lie past the last slot.
    return kept, tl.max(tl.where(match, slots[None, :], 0), 1)
