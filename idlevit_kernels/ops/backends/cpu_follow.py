"""The native CPU kernels of idle tokens that follow; arguments and results are those of the references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentValueError
from ..dtypes import accumulate_dtype
from . import native
from .cpu import CPU, extension, optional_address
from .reference import bad_indices


def _call(kernel: str, *args: Any) -> int:
    return CPU.kernels[kernel](*args, torch.get_num_threads())


def _checked(op: str, status: int, indices: Tensor, num_tokens: int) -> None:
    if status == 1:
        raise bad_indices(op, indices, num_tokens)
    if status:
        raise RuntimeError(f"{op}: the native kernel refused the call with status {status}")


def _groups_checked(op: str, status: int, num_groups: int) -> None:
    if status == 1:
        raise ArgumentValueError(f"{op}: groups must be -1 or one of the {num_groups} groups, and one is not")
    if status:
        raise RuntimeError(f"{op}: the native kernel refused the call with status {status}")


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return native.dense(t, dtype)[0]


def project_tokens(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    projection: Tensor,
    num_prefix_tokens: int,
) -> Tensor:
    x = native.rows_of(x)[0]
    (dtype,), at_norm, _owners = CPU.parameters(x, norm_weight, norm_bias)
    projection = _dense(projection, accumulate_dtype(x.dtype))
    (B, T, C), (by_image, by_token, _), d = x.shape, x.stride(), projection.shape[1]
    features = x.new_empty((B, T - num_prefix_tokens, d), dtype=accumulate_dtype(x.dtype))
    status = _call(
        "project_tokens", dtype, B, T, 0, C, num_prefix_tokens, native.address(x), by_image, by_token, *at_norm, eps,
        projection.data_ptr(), d, features.data_ptr(),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"project_tokens: the native kernel refused the call with status {status}")
    return features


def _memory(features: Tensor) -> Tensor:
    """What the kernels of selection and assignment work in."""
    _, N, d = features.shape
    each = extension().cpu_spread_memory(native.DTYPES[features.dtype], N, d)  # type: ignore[union-attr]
    return features.new_empty(each * torch.get_num_threads(), dtype=torch.uint8)


def _padding(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else _dense(padding, torch.bool)


def select_spread(features: Tensor, num_keep: int, num_prefix_tokens: int, padding: Tensor | None) -> Tensor:
    return _spread(features, num_keep, num_prefix_tokens, padding, assigned=False)[0]


def spread_groups(
    features: Tensor, num_keep: int, num_prefix_tokens: int, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``select_spread`` and ``assign_tokens`` of its indices: what is compared for the one gives the other."""
    indices, groups, sizes = _spread(features, num_keep, num_prefix_tokens, padding, assigned=True)
    assert groups is not None and sizes is not None
    return indices, groups, sizes


def _spread(
    features: Tensor, num_keep: int, num_prefix_tokens: int, padding: Tensor | None, assigned: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    features, padding = _dense(features, features.dtype), _padding(padding)
    B, N, d = features.shape
    n, T = num_prefix_tokens + num_keep, num_prefix_tokens + N
    indices = features.new_empty((B, n), dtype=torch.int64)
    groups = features.new_empty((B, T), dtype=torch.int64) if assigned else None
    sizes = features.new_empty((B, n)) if assigned else None
    memory = _memory(features)
    status = _call(
        "select_spread", native.DTYPES[features.dtype], B, T, n, 0, num_prefix_tokens, features.data_ptr(), d,
        optional_address(padding), memory.data_ptr(), indices.data_ptr(), optional_address(groups),
        optional_address(sizes),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"select_spread: the native kernel refused the call with status {status}")
    return indices, groups, sizes


def assign_tokens(
    features: Tensor, indices: Tensor, num_prefix_tokens: int, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    features, padding = _dense(features, features.dtype), _padding(padding)
    indices = _dense(indices, torch.int64)
    (B, N, d), n = features.shape, indices.shape[1]
    T = num_prefix_tokens + N
    groups, sizes = features.new_empty((B, T), dtype=torch.int64), features.new_empty((B, n))
    memory = _memory(features)
    status = _call(
        "assign_tokens", native.DTYPES[features.dtype], B, T, n, 0, num_prefix_tokens, features.data_ptr(), d,
        indices.data_ptr(), optional_address(padding), memory.data_ptr(), groups.data_ptr(), sizes.data_ptr(),
    )  # fmt: skip
    _checked("assign_tokens", status, indices, T)
    return groups, sizes


def gather_mean_norm(
    x: Tensor,
    groups: Tensor,
    sizes: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x, groups = native.rows_of(x)[0], _dense(groups, torch.int64)
    sizes = _dense(sizes, accumulate_dtype(x.dtype))
    (dtype,), at_norm, _owners = CPU.parameters(x, norm_weight, norm_bias)
    (B, T, C), (by_image, by_token, _), n = x.shape, x.stride(), sizes.shape[1]
    tokens, normed = x.new_empty((B, n, C)), x.new_empty((B, n, C))
    workspace = x.new_empty(B * (T + n + 1), dtype=torch.int32)
    status = _call(
        "gather_mean_norm", dtype, B, T, n, C, native.address(x), by_image, by_token, groups.data_ptr(),
        sizes.data_ptr(), *at_norm, eps, workspace.data_ptr(), tokens.data_ptr(), normed.data_ptr(),
    )  # fmt: skip
    _groups_checked("gather_mean_norm", status, n)
    return tokens, normed


def _follow(
    op: str,
    x: Tensor,
    groups: Tensor,
    branch1: Tensor,
    gamma1: Tensor | None,
    scale1: float,
    branch2: Tensor,
    gamma2: Tensor | None,
    scale2: float,
    out: Tensor,
) -> None:
    groups = _dense(groups, torch.int64)
    branch1, branch2 = _dense(branch1, x.dtype), _dense(branch2, x.dtype)
    (dtype,), (at_gamma1, at_gamma2), _owners = CPU.parameters(x, gamma1, gamma2)
    (B, T, C), (by_image, by_token, _), n = x.shape, x.stride(), branch1.shape[1]
    status = _call(
        "follow_tokens", dtype, B, T, n, C, native.address(x), by_image, by_token, groups.data_ptr(),
        native.address(branch1), at_gamma1, scale1, native.address(branch2), at_gamma2, scale2, native.address(out),
        *out.stride()[:2],
    )  # fmt: skip
    _groups_checked(op, status, n)


def follow_tokens(
    x: Tensor,
    groups: Tensor,
    branch1: Tensor,
    gamma1: Tensor | None,
    scale1: float,
    branch2: Tensor,
    gamma2: Tensor | None,
    scale2: float,
) -> Tensor:
    out = x.new_empty(x.shape)
    _follow("follow_tokens", native.rows_of(x)[0], groups, branch1, gamma1, scale1, branch2, gamma2, scale2, out)
    return out


def follow_tokens_(
    x: Tensor,
    groups: Tensor,
    branch1: Tensor,
    gamma1: Tensor | None,
    scale1: float,
    branch2: Tensor,
    gamma2: Tensor | None,
    scale2: float,
) -> None:
    target = native.rows_of(x)[0]
    _follow("follow_tokens_", target, groups, branch1, gamma1, scale1, branch2, gamma2, scale2, target)
    if target is not x:
        x.copy_(target)


def sum_groups(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    x, groups = native.rows_of(x)[0], _dense(groups, torch.int64)
    (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
    out = x.new_empty((B, num_groups, C), dtype=accumulate_dtype(x.dtype))
    workspace = x.new_empty(B * (T + num_groups + 1), dtype=torch.int32)
    status = _call(
        "sum_groups", native.DTYPES[x.dtype], B, T, num_groups, C, native.address(x), by_image, by_token,
        groups.data_ptr(), workspace.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    _groups_checked("sum_groups", status, num_groups)
    return out


def expand_groups(tokens: Tensor, groups: Tensor) -> Tensor:
    tokens, groups = _dense(tokens, tokens.dtype), _dense(groups, torch.int64)
    (B, n, C), T = tokens.shape, groups.shape[1]
    out = tokens.new_empty((B, T, C))
    status = _call(
        "expand_groups", native.DTYPES[tokens.dtype], B, T, n, C, tokens.data_ptr(), groups.data_ptr(), out.data_ptr()
    )
    _groups_checked("expand_groups", status, n)
    return out
