"""Checks of what a caller passes: each error names the op, the argument, what was expected and what came.

Shapes are those of ``functional``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import type_error, value_error
from .library import PLAIN

# What ``inplace`` must be while gradients are recorded.
IN_PLACE = "False while gradients are recorded and x or a parameter requires one (or use torch.no_grad)"

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(op: str, argument: str, value: Tensor, shape: str, dims: tuple[int | None, ...]) -> None:
    """A float tensor of this many dimensions; ``dims`` gives the sizes that are known, None where any will do."""
    if not isinstance(value, Tensor):
        raise type_error(op, argument, f"a tensor {shape}", value)
    if value.dtype not in _FLOATS:
        raise type_error(op, argument, f"a float tensor {shape} (float32, float16, bfloat16 or float64)", value)
    if value.dim() != len(dims) or any(d is not None and d != s for d, s in zip(dims, value.shape, strict=True)):
        sizes = ", ".join("any" if d is None else str(d) for d in dims)
        raise value_error(op, argument, f"{shape} = [{sizes}]", value)


def check_parameter(op: str, argument: str, value: Tensor | None, x: Tensor) -> None:
    if value is not None:
        check_tensor(op, argument, value, "[C]", (x.shape[2],))
        check_device(op, argument, value, x)


def check_device(op: str, argument: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise value_error(op, argument, f"on {x.device}, where x is", value)


def check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_parameter(op, "norm_weight", weight, x)
    check_parameter(op, "norm_bias", bias, x)
    check_number(op, "eps", eps)
    if not eps > 0:
        raise value_error(op, "eps", "a number > 0", eps)


def check_number(op: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise type_error(op, argument, "a number", value)


def check_integer(op: str, argument: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise type_error(op, argument, "an integer", value)


def check_counts(op: str, num_tokens: int, num_keep: int, num_prefix_tokens: int) -> None:
    check_integer(op, "num_keep", num_keep)
    check_integer(op, "num_prefix_tokens", num_prefix_tokens)
    if not 0 <= num_prefix_tokens < num_tokens:
        raise value_error(op, "num_prefix_tokens", f"in [0, T) with T = {num_tokens} tokens", num_prefix_tokens)
    image_tokens = num_tokens - num_prefix_tokens
    if not 1 <= num_keep <= image_tokens:
        raise value_error(op, "num_keep", f"in [1, N] with N = T - num_prefix_tokens = {image_tokens}", num_keep)


def check_indices(op: str, indices: Tensor, batch: int, num_tokens: int, x: Tensor) -> None:
    if not isinstance(indices, Tensor):
        raise type_error(op, "indices", "an int64 tensor [B, n]", indices)
    if indices.dtype != torch.int64:
        raise type_error(op, "indices", "an int64 tensor [B, n]", indices)
    if indices.dim() != 2 or indices.shape[0] != batch or indices.shape[1] > num_tokens:
        raise value_error(op, "indices", f"[B, n] with B = {batch} and n <= T = {num_tokens}", indices)
    check_device(op, "indices", indices, x)


def check_compact(op: str, argument: str, value: Tensor, x: Tensor, indices: Tensor) -> None:
    check_tensor(op, argument, value, "[B, n, C]", (indices.shape[0], indices.shape[1], x.shape[2]))
    check_device(op, argument, value, x)


def check_same_dtype(op: str, argument: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise type_error(op, argument, f"of the dtype of x, {x.dtype}", value)


def check_scatter(op: str, x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    check_tensor(op, "x", x, "[B, T, C]", (None, None, None))
    check_indices(op, indices, x.shape[0], x.shape[1], x)
    check_compact(op, "tokens", tokens, x, indices)
    check_same_dtype(op, "tokens", tokens, x)


def check_writable(op: str, x: Tensor, **sources: Tensor | None) -> None:
    """Raises ValueError unless x can be written to while the sources are read."""
    if torch.compiler.is_compiling():  # functionalisation writes to a copy
        return
    for argument, value in sources.items():
        if value is not None and _share_memory(x, value):
            raise value_error(
                op,
                argument,
                "in other memory than x, another storage (call .clone())",
                value,
            )
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise value_error(op, "x", "a tensor whose elements do not share memory (call .contiguous() first)", x)


def _share_memory(x: Tensor, other: Tensor) -> bool:
    if not x.numel() or type(x) not in PLAIN or type(other) not in PLAIN:
        return False  # what a subclass holds is its own affair, and its operators'
    at = x.untyped_storage().data_ptr()
    return at != 0 and at == other.untyped_storage().data_ptr()
