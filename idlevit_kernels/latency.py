"""How long an idle block takes at each number of kept tokens, on the device at hand: the staircase that decides K.

A kernel computes whole tiles, so a few tokens more often cost nothing; and where calls cost more than arithmetic (a
small batch on a large GPU) idling does not pay at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .block import IdleBlock
from .complexity import default_input_size
from .timing import alternate

# What takes less than this less is not faster: the noise of a few samples.
_RELEVANT = 0.02
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


def rotating(model: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """A call of the model on the next of the inputs."""
    rotation = itertools.cycle(inputs)
    return lambda: model(next(rotation))


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


def block_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batch: int, input_size: tuple[int, ...] | None = None
) -> list[BlockInput]:
    """What enters each block in a forward pass on images of the size, the model's own by default."""
    found: dict[nn.Module, BlockInput] = {}

    def record(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[block] = BlockInput(tuple(args[0].shape), args[1:], named)

    like = next(model.parameters())
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with evaluation(model):
            size = input_size or default_input_size(model)
            model(torch.randn((batch, *size), device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return [found[block] for block in blocks]


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


def token_counts(num_image_tokens: int, num_prefix_tokens: int) -> list[int]:
    """Numbers of kept tokens worth measuring: all, and those that fill tiles, about fourteen, descending."""
    tile = 2 ** max(0, round(math.log2(num_image_tokens / 14)))
    filled = range(tile, num_image_tokens + num_prefix_tokens, tile)
    kept = [n - num_prefix_tokens for n in filled if 1 <= n - num_prefix_tokens < num_image_tokens]
    return [num_image_tokens, *reversed(kept)]


def steps(seconds: Mapping[int, float]) -> list[int]:
    """The ends of the staircase's steps, descending: numbers of kept tokens that no larger one does as fast.

    The first is the largest, so a layer in which idling does not pay is dense.
    """
    found: list[int] = []
    fastest = math.inf
    for num_keep in sorted(seconds, reverse=True):
        if seconds[num_keep] < (1 - _RELEVANT) * fastest or not found:
            found.append(num_keep)
            fastest = seconds[num_keep]
    return found
