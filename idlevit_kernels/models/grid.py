"""What the idle blocks of pyramids have in common: stages of blocks, each on a grid of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..block import IdleBlock, take_over
from ..errors import value_error
from ..schedule import check_ratio


class IdleGridBlock(IdleBlock):
    """An idle block that is told the height and width of its tokens, and has no prefix tokens.

    It and ``block`` share modules, parameters and buffers, under the same names; ``block`` alone keeps the settings
    that belong to an input size. Hooks on the block work as ever; attention runs on gathered tokens, so hooks on its
    parts do as well, but not those on the attention module as a whole.

    Args:
        block: timm's block.
        keep_ratio: in (0, 1].
        num_prefix_tokens, scorer: 0 and "mean": there is no class token.
    """

    def __init__(self, block: nn.Module, keep_ratio: float, num_prefix_tokens: int = 0, scorer: str = "mean"):
        nn.Module.__init__(self)  # the checks of IdleBlock are for blocks on a sequence of tokens
        op = type(self).__name__
        if num_prefix_tokens or scorer not in ("mean", "auto"):
            got = f"{num_prefix_tokens} prefix tokens and scorer {scorer!r}"
            raise value_error(op, "scorer", "'mean' or 'auto', and num_prefix_tokens 0: there is no class token", got)
        self.keep_ratio = check_ratio(op, keep_ratio)
        self.num_prefix_tokens, self.scorer = 0, "mean"
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = block.__dict__[name]
        take_over(self, block)
        self._block = (block,)  # in a tuple, so that it is no sub-module


def put_blocks(stages: Iterable[Any], blocks: Iterable[nn.Module]) -> None:
    """Replaces the blocks of all stages, which are ModuleLists or Sequentials, in their order."""
    remaining = iter(blocks)
    for stage in stages:
        for i in range(len(stage)):
            stage[i] = next(remaining)
