"""The arguments of an op, as its tests on every kind of device need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlevit_kernels.ops.testing import Case, make_arguments


def copy(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in the same layout, in memory of their own (in-place ops write to their arguments)."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
        if isinstance(a, Tensor)
        else a
        for a in arguments
    )


def with_grad(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def op_with_grad(op: str, case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """Arguments that all take a gradient; scores do not: selection has none."""
    arguments = list(with_grad(make_arguments(op, case, device=device)))
    if op == "select_gather_norm":
        arguments[1] = arguments[1].detach()
    return tuple(arguments)
