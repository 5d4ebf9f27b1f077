"""The PyTorch reference as a backend: runs every call."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from ...errors import ArgumentValueError, Words, value_error
from .. import reference  # noqa: F401 (fills RECORDS)
from ..record import RECORDS
from .backend import Backend, Kernel


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


@functools.cache
def _checked(op: str) -> Kernel:
    """The reference of the op, with its indices checked; those of a backward pass its forward has checked."""
    record = RECORDS[op]
    function = record.reference
    parameters = list(inspect.signature(function).parameters)
    if "indices" not in parameters or record.derivative_of is not None:
        return function
    at, count = parameters.index("indices"), parameters.index("num_tokens") if "num_tokens" in parameters else None

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        check_indices(op, args[at], args[0].shape[1] if count is None else args[count])
        return function(*args)

    return checked


class ReferenceBackend(Backend):
    name = "reference"
    device_types = None

    def installed(self) -> list[str]:
        return []

    def reasons(self, op: str, args: tuple[Any, ...]) -> list[str]:
        return []

    def kernel(self, op: str) -> Kernel | None:
        return _checked(op) if op in RECORDS else None


REFERENCE = ReferenceBackend()
