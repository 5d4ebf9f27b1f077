"""The native CPU kernels: allocates outputs and hands addresses, sizes and strides to the extension."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import env
from ..build_info import build_info
from ..errors import value_error
from ..reference.layer_norm import accumulate_dtype
from .reference import bad_indices

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_OPS = frozenset(
    {
        "token_scores",
        "select_tokens",
        "select_gather_norm",
        "gather_tokens",
        "scatter_tokens",
        "scatter_tokens_",
        "expand_tokens",
        "gather_add_norm",
        "gather_norm_backward",
        "scatter_add_tokens",
        "scatter_add_tokens_",
    }
)


@functools.cache
def extension() -> ModuleType | None:
    try:
        from .. import _C
    except ImportError as error:
        if build_info().get("native"):  # built, yet it does not load: that is not a missing compiler
            raise ImportError(f"idlevit_kernels._C was built but does not load: {error}") from error
        return None
    name = env.get("IDLEVIT_CPU_ISA", "")
    if name:
        if name not in _C.cpu_instruction_sets():
            raise value_error("IDLEVIT_CPU_ISA", "the name", f"one of {_C.cpu_instruction_sets()}", name)
        _C.cpu_set_instruction_set(name)
    return _C


@functools.cache
def installed() -> list[str]:
    if extension() is None:
        return [f"the native extension is not built: {build_info().get('reason') or 'no build is recorded'}"]
    return []


def reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    found = list(installed())
    if op not in _OPS:
        found.append(f"it has no kernel for {op}")
    first = args[0]
    for a in args:
        if isinstance(a, Tensor) and a.device.type != "cpu":
            found.append(f"it runs on CPU tensors, and one is on {a.device}")
            break
    if first.dtype not in _DTYPES:
        found.append(f"it knows float32, float64, float16 and bfloat16, not {first.dtype}")
    if first.dim() == 3 and not found and first.shape[2] > extension().MAX_CHANNELS:  # type: ignore[union-attr]
        found.append(f"it takes at most {extension().MAX_CHANNELS} channels, not {first.shape[2]}")  # type: ignore[union-attr]
    return found


def _call(kernel: str, *args: Any) -> int:
    return getattr(extension(), kernel)(*args, torch.get_num_threads())


def _shape(x: Tensor, n: int) -> tuple[int, int, int, int, int]:
    B, T, C = x.shape
    return _DTYPES[x.dtype], B, T, n, C


def _rows(x: Tensor) -> Tensor:
    """x itself where its channels are contiguous; a copy otherwise."""
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _tokens(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _parameter(t: Tensor | None, like: Tensor) -> Tensor | None:
    """Parameters reach the kernels contiguous and in the accumulate type."""
    return None if t is None else t.to(accumulate_dtype(like.dtype)).contiguous()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).contiguous()


def _check(status: int, op: str, indices: Tensor, num_tokens: int) -> None:
    if status == 1:
        raise bad_indices(op, indices, num_tokens)
    if status:
        raise RuntimeError(f"{op}: the native kernel refused the call with status {status}")


def token_scores(
    x: Tensor, direction: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    x = _rows(x)
    direction, weight, bias = (_parameter(t, x) for t in (direction, norm_weight, norm_bias))
    scores = x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))
    _call(
        "cpu_token_scores", *_shape(x, 0), *_tokens(x), _address(direction), _address(weight), _address(bias), eps,
        scores.data_ptr(),
    )  # fmt: skip
    return scores


def select_tokens(scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    scores = scores.to(accumulate_dtype(scores.dtype)).contiguous()
    B, T = scores.shape
    indices = scores.new_empty((B, num_prefix_tokens + num_keep), dtype=torch.int64)
    _call(
        "cpu_select_tokens", _DTYPES[scores.dtype], B, T, indices.shape[1], 1, num_prefix_tokens, scores.data_ptr(),
        indices.data_ptr(),
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
    x, scores = _rows(x), scores.to(accumulate_dtype(x.dtype)).contiguous()
    weight, bias = _parameter(norm_weight, x), _parameter(norm_bias, x)
    n = num_prefix_tokens + num_keep
    indices = x.new_empty((x.shape[0], n), dtype=torch.int64)
    normed = x.new_empty((x.shape[0], n, x.shape[2]))
    _call(
        "cpu_select_gather_norm", *_shape(x, n), num_prefix_tokens, *_tokens(x), scores.data_ptr(), _address(weight),
        _address(bias), eps, indices.data_ptr(), normed.data_ptr(),
    )  # fmt: skip
    return indices, normed


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    x, indices = _rows(x), indices.contiguous()
    out = x.new_empty((*indices.shape, x.shape[2]))
    status = _call(
        "cpu_gather_tokens", *_shape(x, indices.shape[1]), *_tokens(x), indices.data_ptr(), out.data_ptr()
    )  # fmt: skip
    _check(status, "gather_tokens", indices, x.shape[1])
    return out


def gather_norm_backward(
    grad: Tensor, x: Tensor, indices: Tensor, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(x.dtype)
    row, weight = gather_tokens(x, indices).to(acc), _parameter(norm_weight, x)
    shape = row.shape[-1:]
    _, mean, rstd = torch.native_layer_norm(row, shape, weight, None, eps)
    ones = row.new_ones(shape) if weight is None else weight
    grad_row, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(acc).contiguous(), row, shape, mean, rstd, ones, ones, [True, True, True]
    )
    return expand_tokens(grad_row.to(x.dtype), indices, x.shape[1]), grad_weight, grad_bias


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
    x, indices, branch = _rows(x), indices.contiguous(), _like(branch, x)
    gamma, weight, bias = (_parameter(t, x) for t in (gamma, norm_weight, norm_bias))
    tokens, normed = torch.empty_like(branch), torch.empty_like(branch)
    status = _call(
        "cpu_gather_add_norm", *_shape(x, indices.shape[1]), *_tokens(x), indices.data_ptr(), branch.data_ptr(),
        _address(gamma), scale, _address(weight), _address(bias), eps, tokens.data_ptr(), normed.data_ptr(),
    )  # fmt: skip
    _check(status, "gather_add_norm", indices, x.shape[1])
    return tokens, normed


def _scatter(
    op: str,
    x: Tensor | None,
    indices: Tensor,
    tokens: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Writes into ``out``; the rows that no index names come from x, or are zero where x is None."""
    indices, tokens = indices.contiguous(), _like(tokens, out)
    branch = None if branch is None else _like(branch, out)
    gamma = _parameter(gamma, out)
    status = _call(
        "cpu_scatter_tokens", *_shape(out, indices.shape[1]), *((0, 0, 0) if x is None else _tokens(x)),
        indices.data_ptr(), tokens.data_ptr(), _address(branch), _address(gamma), scale, *_tokens(out),
    )  # fmt: skip
    _check(status, op, indices, out.shape[1])


def _scatter_in_place(op: str, x: Tensor, *args: Any) -> None:
    target = _rows(x)
    _scatter(op, target, *args, target)
    if target is not x:
        x.copy_(target)


def scatter_tokens(x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _scatter("scatter_tokens", _rows(x), indices, tokens, None, None, 1.0, out)
    return out


def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    _scatter_in_place("scatter_tokens_", x, indices, tokens, None, None, 1.0)


def expand_tokens(tokens: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    out = tokens.new_empty((tokens.shape[0], num_tokens, tokens.shape[2]))
    _scatter("expand_tokens", None, indices, tokens, None, None, 1.0, out)
    return out


def scatter_add_tokens(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> Tensor:
    out = x.new_empty(x.shape)
    _scatter("scatter_add_tokens", _rows(x), indices, tokens, branch, gamma, scale, out)
    return out


def scatter_add_tokens_(
    x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> None:
    _scatter_in_place("scatter_add_tokens_", x, indices, tokens, branch, gamma, scale)
