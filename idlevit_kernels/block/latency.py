"""How long a block takes on the device at hand, idle beside dense."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .api import IdleBlock
from .timing import alternate

# More than the L2 cache of any GPU holds.
_ROTATED_BYTES = 256 << 20
_MAX_INPUTS = 64
# Of a comparison of two blocks.
_SECONDS, _ROUNDS = 0.5, 9


def num_inputs(num_bytes: int, device: torch.device) -> int:
    """How many inputs of so many bytes a benchmark goes round: on a GPU as many as its L2 cache cannot hold, up to 64;
    on a CPU three."""
    if device.type != "cuda":
        return 3
    return min(max(3, math.ceil(_ROTATED_BYTES / max(1, num_bytes))), _MAX_INPUTS)


def random_inputs(shape: tuple[int, ...], like: Tensor, limit: int = _MAX_INPUTS) -> list[Tensor]:
    """Normally distributed tensors of the shape, of ``like``'s dtype and on its device; ``num_inputs`` or the limit."""
    count = min(num_inputs(math.prod(shape) * like.dtype.itemsize, like.device), limit)
    return [torch.randn(shape, device=like.device, dtype=like.dtype) for _ in range(count)]


def rotating(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call of the function on the next of the inputs, so that no input is found in a cache."""
    rotation = itertools.cycle(inputs)
    return lambda: function(next(rotation))


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """What enters a block: tokens [B, T, C] and what its model gives it beside them (a grid, a rotary embedding)."""

    shape: tuple[int, ...]
    others: tuple[Any, ...] = ()
    named: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rotating(self, block: nn.Module, tokens: Sequence[Tensor] | None = None) -> Callable[[], Any]:
        """A call of the block on the next of the tokens, ``random_inputs`` of its own by default."""
        tokens = tokens or random_inputs(self.shape, next(block.parameters()))
        return rotating(lambda x: block(x, *self.others, **self.named), tokens)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and no gradients; after that every module has the mode back that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def slower_than_dense(
    idle: Sequence[IdleBlock], dense: Sequence[nn.Module], inputs: Sequence[BlockInput]
) -> list[bool]:
    """Of each layer, whether its idle block takes as long as its dense one, or longer.

    Equal layers (class, keep ratio, shape) are measured once.
    """
    known: dict[Any, bool] = {}
    slower = []
    for i, d, given in zip(idle, dense, inputs, strict=True):
        key = type(i), i.keep, given.shape
        if key not in known:
            calls = {"idle": given.rotating(i), "dense": given.rotating(d)}
            with evaluation(d), evaluation(i):
                timings = alternate(calls, _SECONDS, _ROUNDS, next(d.parameters()).device)
            known[key] = timings["idle"].median >= timings["dense"].median
        slower.append(known[key])
    return slower
