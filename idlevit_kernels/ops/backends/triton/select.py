"""select_tokens and select_gather_norm: threshold by radix search, compaction by prefix sum, no sort.

One launch does the whole of select_gather_norm. A program recomputes the threshold of its image from the scores, which
lie in the L2 cache, and then handles its own part of the kept tokens. The alternative, one program per image that
writes indices and a second launch that gathers, puts a kernel that is latency alone (16 dependent reductions, some
2 us) and a launch gap in front of the gather; in eager mode at B = 1 that launch costs more on the host than the
search does on the device. At large B the searches of different programs overlap, and ``walk`` bounds their number.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SEARCH_PROGRAMS, contiguous_channels, launch, row_tile, walk
from .rows import dense_offsets, normalize_rows, own_rows, parameter, tile_offsets, widen

# The widest image whose keys fit in the registers of one program: 32 keys a thread with 16 warps.
MAX_TOKENS = 16384


@triton.jit
def order_keys(scores):
    """Unsigned integers in the order of the scores: NaN is 0, below -inf; -0 equals +0."""
    if scores.dtype == tl.float64:
        bits = scores.to(tl.uint64, bitcast=True)
        sign = tl.full(scores.shape, 1, tl.uint64) << 63
    else:
        bits = scores.to(tl.uint32, bitcast=True)
        sign = tl.full(scores.shape, 1, tl.uint32) << 31
    keys = bits ^ tl.where(scores < 0, sign | (sign - 1), sign)
    keys = tl.where(scores == 0, sign, keys)
    return tl.where(scores != scores, sign ^ sign, keys)


@triton.jit
def kth_largest(keys, k):
    """The k-th largest key: two bits a step, the highest first, of the largest value that k keys reach."""
    threshold = tl.full((), 0, keys.dtype)
    unit = tl.full((), 1, keys.dtype) << (keys.dtype.primitive_bitwidth - 2)
    for _ in range(keys.dtype.primitive_bitwidth // 2):
        # The three counts share one reduction, 21 bits for each.
        reached = (keys >= threshold + unit).to(tl.int64)
        reached += (keys >= threshold + 2 * unit).to(tl.int64) << 21
        reached += (keys >= threshold + 3 * unit).to(tl.int64) << 42
        counts = tl.sum(reached, 0)
        digit = ((counts & 0x1FFFFF) >= k).to(keys.dtype)
        digit += (((counts >> 21) & 0x1FFFFF) >= k).to(keys.dtype)
        digit += ((counts >> 42) >= k).to(keys.dtype)
        threshold += digit * unit
        unit = unit >> 2
    return threshold


@triton.jit
def kept_slots(scores, N, num_keep, BLOCK_N: tl.constexpr):
    """Which of an image's N scores are among the num_keep largest, and the rank of each of those in token order."""
    tokens = tl.arange(0, BLOCK_N)
    valid = tokens < N
    # Key 0 never reaches a candidate threshold, so padding does not count.
    keys = tl.where(valid, order_keys(widen(tl.load(scores + tokens, mask=valid, other=0.0))), 0)
    threshold = kth_largest(keys, num_keep)
    above = (keys > threshold).to(tl.int32)
    tied = ((keys == threshold) & valid).to(tl.int32)
    # Ties go to the lower index: the first num_keep - sum(above) of them. One scan counts both kinds, 16 bits each.
    ties = num_keep - tl.sum(above, 0)
    seen = tl.cumsum(above + (tied << 16), 0)
    kept = (above + (tied & ((seen >> 16) <= ties).to(tl.int32))) > 0
    return kept, (seen & 0xFFFF) + tl.minimum(seen >> 16, ties) - 1


@triton.jit(do_not_specialize=["N", "num_keep", "num_prefix"])
def _select_tokens(
    scores,  # [B, P + N]
    indices,  # [B, n] int64
    N,
    num_keep,
    num_prefix,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    indices += image * (num_prefix + num_keep)
    prefix = tl.arange(0, BLOCK_P)
    tl.store(indices + prefix, prefix.to(tl.int64), mask=prefix < num_prefix)
    kept, slot = kept_slots(scores + image * (num_prefix + N) + num_prefix, N, num_keep, BLOCK_N)
    tokens = num_prefix + tl.arange(0, BLOCK_N)
    tl.store(indices + num_prefix + slot, tokens.to(tl.int64), mask=kept)


@triton.jit(do_not_specialize=["N", "num_keep", "num_prefix", "steps"])
def _select_gather_norm(
    x,  # [B, T, C], channels contiguous
    scores,  # [B, T]
    weight,  # [C] or None
    bias,  # [C] or None
    indices,  # [B, n] int64
    normed,  # [B, n, C]
    N,
    num_keep,
    num_prefix,
    steps,
    batch_stride,
    token_stride,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = num_prefix + num_keep
    image, first = own_rows(n, steps, ROWS)
    last = tl.minimum(first + ROWS * steps, n)
    scores += image * (num_prefix + N) + num_prefix
    indices += image * n

    columns = tl.arange(0, BLOCK_C)
    in_row = columns < C
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    w = parameter(weight, columns, in_row, 1.0, dtype)
    b = parameter(bias, columns, in_row, 0.0, dtype)

    # Each program writes the slots [first, last) of its own; the prefix tokens hold the first slots.
    kept, slot = kept_slots(scores, N, num_keep, BLOCK_N)
    slot += num_prefix
    tokens = num_prefix + tl.arange(0, BLOCK_N)
    tl.store(indices + slot, tokens.to(tl.int64), mask=kept & (slot >= first) & (slot < last))
    # The barrier makes the indices that this program's other threads wrote visible to the loads below.
    tl.debug_barrier()

    for step in range(steps):
        slots = first + step * ROWS + tl.arange(0, ROWS)
        in_prefix = slots < num_prefix
        token = tl.load(indices + slots, mask=(slots < n) & (slots >= num_prefix), other=0)
        token = tl.where(in_prefix, slots.to(tl.int64), token)
        tl.store(indices + slots, token, mask=in_prefix)
        mask = (slots < n)[:, None] & in_row[None, :]
        offsets = tile_offsets(image, token, columns, batch_stride, token_stride)
        row = widen(tl.load(x + offsets, mask=mask, other=0.0))
        result = normalize_rows(row, w, b, in_row, C, EPS)
        out = normed + dense_offsets(image, slots, columns, n, C)
        tl.store(out, result.to(normed.dtype.element_ty), mask=mask)


def _key_block(image_tokens: int) -> tuple[int, int]:
    """Block size and warps for the keys of an image."""
    block = max(16, triton.next_power_of_2(image_tokens))
    return block, min(16, max(4, block // 1024))


def select_tokens(scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    scores = scores.contiguous()
    B, T = scores.shape
    indices = scores.new_empty((B, num_prefix_tokens + num_keep), dtype=torch.int64)
    block, warps = _key_block(T - num_prefix_tokens)
    launch(
        _select_tokens, B, scores.device, scores, indices, T - num_prefix_tokens, num_keep, num_prefix_tokens,
        BLOCK_N=block, BLOCK_P=max(16, triton.next_power_of_2(num_prefix_tokens)), num_warps=warps,
    )  # fmt: skip
    return indices


def select_gather_norm(
    x: Tensor,
    scores: Tensor,
    num_keep: int,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x, scores = contiguous_channels(x), scores.contiguous()
    norm_weight, norm_bias = (None if p is None else p.contiguous() for p in (norm_weight, norm_bias))
    B, T, C = x.shape
    n = num_prefix_tokens + num_keep
    indices = x.new_empty((B, n), dtype=torch.int64)
    normed = x.new_empty((B, n, C))
    tile = row_tile(C, x.dtype)
    block, warps = _key_block(T - num_prefix_tokens)
    tile["num_warps"] = max(tile["num_warps"], warps)
    if "maxnreg" in tile:
        tile["maxnreg"] = 128  # what 16 warps can have
    steps, programs = walk(B, n, tile["ROWS"], SEARCH_PROGRAMS)
    launch(
        _select_gather_norm, programs, x.device,
        x, scores, norm_weight, norm_bias, indices, normed, T - num_prefix_tokens, num_keep, num_prefix_tokens, steps,
        x.stride(0), x.stride(1), EPS=eps, BLOCK_N=block, **tile,
    )  # fmt: skip
    return indices, normed
