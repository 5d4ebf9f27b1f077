"""token_cut_loss: attention rows in tiles with an online softmax, recomputed in the backward; no [B, T, T] is stored.

The backward has a pass for the gradient of q and one for that of k, so that each output is written by one program and
needs no atomics. A program holds [BLOCK_M, BLOCK_D] of its gradient and walks all tiles of logits, each of which is a
product over all C channels. A wider BLOCK_D means fewer programs that repeat that product, but more registers.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import accumulate_dtype
from ...reference.token_cut_loss import cut_loss, row_weights, token_sides
from .launch import contiguous_channels, launch, tuned

# Matrix products are bound by arithmetic, and what suits them differs between GPUs; so here a choice is timed. All of
# these fit the 99 KiB of shared memory and the registers of the smallest supported GPUs; the first is the default.
FORWARD_CONFIGS = (
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
)
BACKWARD_CONFIGS = (
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 256, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
)
# tf32 products read operands twice as wide.
TF32_FORWARD_CONFIGS = tuple({**config, "BLOCK_K": 32} for config in FORWARD_CONFIGS)
TF32_BACKWARD_CONFIGS = (
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
)
# float32 products in full precision and float64 ones run on the ordinary cores and keep their operands in registers.
DOUBLE_FORWARD_CONFIGS = ({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},)
WIDE_FORWARD_CONFIGS = ({**DOUBLE_FORWARD_CONFIGS[0], "maxnreg": 128},)
WIDE_BACKWARD_CONFIGS = ({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2},)


@triton.jit
def _logits(
    a,  # rows of one image
    b,  # rows of the same image
    rows,  # [M]
    columns,  # [N]
    T,
    C,  # at run time: a loop of known length over the channels is unrolled until its addresses fill the registers
    a_stride,
    b_stride,
    SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """SCALE * a[rows] @ b[columns]^T over all C channels [M, N]."""
    result = tl.zeros([rows.shape[0], columns.shape[0]], dtype)
    a_rows = a + rows.to(tl.int64)[:, None] * a_stride
    b_rows = b + columns.to(tl.int64)[None, :] * b_stride
    for start in range(0, C, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        left = tl.load(a_rows + channels[None, :], mask=(rows < T)[:, None] & (channels < C)[None, :], other=0.0)
        right = tl.load(b_rows + channels[:, None], mask=(columns < T)[None, :] & (channels < C)[:, None], other=0.0)
        result = tl.dot(left, right, result, input_precision=PRECISION, out_dtype=dtype)
    return result * SCALE


@triton.jit
def _wanted_side(side):
    """The side that a row's share counts: idle (2) for a selected row, kept (1) for an idle one."""
    return tl.where(side == 2, 1, 2)


@triton.jit(do_not_specialize=["T"])
def _token_cut_loss(
    q,  # [B, T, C], channels contiguous
    k,  # [B, T, C], channels contiguous
    sides,  # [B, T] int8: 0 prefix, 1 kept, 2 idle
    lse,  # [B, T]
    share,  # [B, T]
    T,
    C,
    q_batch_stride,
    q_token_stride,
    k_batch_stride,
    k_token_stride,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    q += image * q_batch_stride
    k += image * k_batch_stride
    sides += image * T
    dtype: tl.constexpr = lse.dtype.element_ty
    wanted = _wanted_side(tl.load(sides + rows, mask=rows < T, other=0))
    highest = tl.full([BLOCK_M], float("-inf"), dtype)
    total = tl.zeros([BLOCK_M], dtype)
    across = tl.zeros([BLOCK_M], dtype)
    for start in range(0, T, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = _logits(q, k, rows, columns, T, C, q_token_stride, k_token_stride, SCALE, BLOCK_K, PRECISION, dtype)
        logits = tl.where((columns < T)[None, :], logits, float("-inf"))
        side = tl.load(sides + columns, mask=columns < T, other=0)
        # Online softmax: what was summed so far is rescaled when the maximum of the row grows.
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - new_highest[:, None])
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        across = across * rescale + tl.sum(tl.where(side[None, :] == wanted[:, None], weights, 0.0), 1)
        highest = new_highest
    tl.store(lse + image * T + rows, highest + tl.log(total), mask=rows < T)
    tl.store(share + image * T + rows, across / total, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _token_cut_loss_backward(
    grad,  # scalar: d loss * scale / (B * T)
    a,  # [B, T, C], channels contiguous: q in the pass for the gradient of q, k in that of k
    b,  # [B, T, C], channels contiguous: the other one
    sides,  # [B, T] int8
    lse,  # [B, T]
    share,  # [B, T]
    factor,  # [B, T]: 2 c_i share_i
    out,  # [B, T, C]: gradient of a
    T,
    C,
    a_batch_stride,
    a_token_stride,
    b_batch_stride,
    b_token_stride,
    OF_KEYS: tl.constexpr,  # a is k: the rows of a tile are keys and its columns queries
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_M)
    parts = tl.cdiv(C, BLOCK_D)
    image = (tl.program_id(0) // (tiles * parts)).to(tl.int64)
    rows = (tl.program_id(0) // parts % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = (tl.program_id(0) % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
    a += image * a_batch_stride
    b += image * b_batch_stride
    sides += image * T
    lse += image * T
    share += image * T
    factor += image * T
    dtype: tl.constexpr = lse.dtype.element_ty
    row_side = tl.load(sides + rows, mask=rows < T, other=0)[:, None]
    if not OF_KEYS:
        row_lse = tl.load(lse + rows, mask=rows < T, other=0.0)[:, None]
        row_share = tl.load(share + rows, mask=rows < T, other=0.0)[:, None]
        row_factor = tl.load(factor + rows, mask=rows < T, other=0.0)[:, None]
    result = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    for start in range(0, T, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = _logits(a, b, rows, columns, T, C, a_token_stride, b_token_stride, SCALE, BLOCK_K, PRECISION, dtype)
        column_side = tl.load(sides + columns, mask=columns < T, other=0)[None, :]
        if OF_KEYS:
            column_lse = tl.load(lse + columns, mask=columns < T, other=0.0)[None, :]
            column_share = tl.load(share + columns, mask=columns < T, other=0.0)[None, :]
            column_factor = tl.load(factor + columns, mask=columns < T, other=0.0)[None, :]
            member = (row_side == _wanted_side(column_side)).to(dtype)
            grad_logits = column_factor * tl.exp(logits - column_lse) * (member - column_share)
        else:
            member = (column_side == _wanted_side(row_side)).to(dtype)
            grad_logits = row_factor * tl.exp(logits - row_lse) * (member - row_share)
        # Past T the logits are 0 and the exponential may overflow: inf * 0 must not reach the product.
        grad_logits = tl.where((columns < T)[None, :], grad_logits, 0.0)
        mask = (columns < T)[:, None] & (channels < C)[None, :]
        right = tl.load(b + columns.to(tl.int64)[:, None] * b_token_stride + channels[None, :], mask=mask, other=0.0)
        result = tl.dot(grad_logits.to(right.dtype), right, result, input_precision=PRECISION, out_dtype=dtype)
    # The small common factor comes last: before the product it would underflow in float16.
    result *= tl.load(grad)
    out += image * T * C
    mask = (rows < T)[:, None] & (channels < C)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * C + channels[None, :], result.to(out.dtype.element_ty), mask=mask)


def product_precision(dtype: torch.dtype) -> str:
    """float32 products follow ``torch.set_float32_matmul_precision``; other types have one precision."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _key(name: str, q: Tensor, precision: str) -> tuple[str, int, int, torch.dtype, str]:
    """What a choice of configuration depends on; sizes by their power of two, and not the batch."""
    return name, triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(q.shape[2]), q.dtype, precision


Configs = tuple[dict[str, int], ...]


def forward_configs(dtype: torch.dtype, precision: str) -> Configs:
    if dtype == torch.float64:
        return DOUBLE_FORWARD_CONFIGS
    if dtype == torch.float32:
        return TF32_FORWARD_CONFIGS if precision == "tf32" else WIDE_FORWARD_CONFIGS
    return FORWARD_CONFIGS


def backward_configs(dtype: torch.dtype, precision: str) -> Configs:
    if dtype == torch.float32 and precision == "tf32":
        return TF32_BACKWARD_CONFIGS
    return WIDE_BACKWARD_CONFIGS if dtype.itemsize >= 4 else BACKWARD_CONFIGS


def token_cut_loss(
    q: Tensor, k: Tensor, indices: Tensor, scale: float, num_prefix_tokens: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = contiguous_channels(q), contiguous_channels(k)
    B, T, C = q.shape
    sides = token_sides(indices, T, num_prefix_tokens)
    lse = q.new_empty((B, T), dtype=accumulate_dtype(q.dtype))
    share = torch.empty_like(lse)
    precision = product_precision(q.dtype)

    def run(config: dict[str, int]) -> None:
        launch(
            _token_cut_loss, B * triton.cdiv(T, config["BLOCK_M"]), q.device,
            q, k, sides, lse, share, T, C, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            SCALE=scale, PRECISION=precision, **config,
        )  # fmt: skip

    configs = forward_configs(q.dtype, precision)
    run(tuned(_key("token_cut_loss", q, precision), configs, run, q.device))
    return cut_loss(share, sides, kind), lse, share


def token_cut_loss_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    lse: Tensor,
    share: Tensor,
    scale: float,
    num_prefix_tokens: int,
    kind: str,
) -> tuple[Tensor, Tensor]:
    q, k = contiguous_channels(q), contiguous_channels(k)
    lse, share = lse.contiguous(), share.contiguous()
    B, T, C = q.shape
    sides = token_sides(indices, T, num_prefix_tokens)
    factor = 2 * row_weights(sides, kind, share.dtype) * share
    grad = grad.to(share.dtype) * (scale / max(1, B * T))
    precision = product_precision(q.dtype)

    def gradient(a: Tensor, b: Tensor, of_keys: bool) -> Tensor:
        out = a.new_empty((B, T, C))

        def run(config: dict[str, int]) -> None:
            programs = B * triton.cdiv(T, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_D"])
            launch(
                _token_cut_loss_backward, programs, q.device,
                grad, a, b, sides, lse, share, factor, out, T, C, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
                OF_KEYS=of_keys, SCALE=scale, PRECISION=precision, **config,
            )  # fmt: skip

        configs = backward_configs(q.dtype, precision)
        run(tuned(_key(f"token_cut_loss_backward_{of_keys}", q, precision), configs, run, q.device))
        return out

    return gradient(q, k, False), gradient(k, q, True)
