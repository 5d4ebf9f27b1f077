"""What a backend is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor

Kernel = Callable[..., Any]
"""Takes the arguments of an op's reference, in their order, and returns what it returns."""


class Backend(abc.ABC):
    """Kernels of one kind.

    Attributes:
        name: as callers give it.
        device_types: those of the tensors it takes; None for any.
    """

    name: str
    device_types: frozenset[str] | None

    @abc.abstractmethod
    def installed(self) -> list[str]:
        """Every reason why it cannot run on this machine; empty if it can."""

    @abc.abstractmethod
    def reasons(self, op: str, args: tuple[Any, ...]) -> list[str]:
        """Every reason why it cannot run this call; empty if it can. The first argument is a tensor."""

    @abc.abstractmethod
    def kernel(self, op: str) -> Kernel | None:
        """The function that runs the op; None if there is none."""

    def kernel_reasons(self, op: str) -> list[str]:
        return [] if self.kernel(op) is not None else [f"it has no kernel for {op}"]

    def device_reasons(self, args: tuple[Any, ...]) -> list[str]:
        """Names one tensor that lies elsewhere."""
        if self.device_types is not None:
            for a in args:
                if isinstance(a, Tensor) and a.device.type not in self.device_types:
                    wanted = " or ".join(sorted(t.upper() for t in self.device_types))
                    return [f"it runs on {wanted} tensors, and one is on {a.device}"]
        return []
