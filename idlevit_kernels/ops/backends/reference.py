"""The PyTorch reference as a backend: runs every call."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from ...errors import ArgumentValueError, Words, value_error
from .. import reference


def installed() -> list[str]:
    return []


def reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    return []


def check_indices(op: str, indices: Tensor, num_tokens: int) -> None:
    """On a GPU the check would wait for the device, so there it is left to PyTorch's own device-side assertion."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    if indices[:, 0].amin() < 0 or indices[:, -1].amax() >= num_tokens or (indices.diff(dim=1) <= 0).any():
        raise bad_indices(op, indices, num_tokens)


def bad_indices(op: str, indices: Tensor, num_tokens: int) -> ArgumentValueError:
    low, high = int(indices.amin()), int(indices.amax())
    return value_error(
        op,
        "indices",
        f"strictly ascending in each image and inside [0, {num_tokens}) (as select_tokens returns them)",
        Words(f"values from {low} to {high}, {'' if (indices.diff(dim=1) > 0).all() else 'not strictly '}ascending"),
    )


def __getattr__(op: str) -> Any:
    """The reference of the op, with its indices checked; those of a backward pass its forward has checked."""
    if op not in reference.__all__:
        raise AttributeError(op)
    function = getattr(reference, op)
    parameters = list(inspect.signature(function).parameters)
    if "indices" not in parameters or op.endswith("_backward"):
        return function
    at, count = parameters.index("indices"), parameters.index("num_tokens") if "num_tokens" in parameters else None

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        check_indices(op, args[at], args[0].shape[1] if count is None else args[count])
        return function(*args)

    globals()[op] = checked
    return checked
