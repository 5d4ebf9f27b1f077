"""What the idle blocks of pyramids have in common: stages of blocks, each on a grid of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import dense, ops
from ..block import IdleBlock, take_over
from ..dense import plain_linear
from ..errors import Words, value_error
from ..schedule import check_ratio
from ..scoring import layer_norm_parameters


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
            got = Words(f"{num_prefix_tokens} prefix tokens and scorer {scorer!r}")
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


# Below, B counts images or windows, indices [B, K] are those of the kept tokens, or None where all are kept.


def linear(layer: Any, x: Tensor) -> Tensor:
    return dense.linear(x, layer.weight, layer.bias) if plain_linear(layer) else layer(x)


def gather(tokens: Tensor, indices: Tensor | None, backend: str) -> Tensor:
    return tokens if indices is None else ops.gather_tokens(tokens, indices, backend=backend)


def scatter_add(tokens: Tensor, indices: Tensor | None, kept: Tensor, branch: Tensor, backend: str) -> Tensor:
    """``tokens`` with ``kept + branch`` at the indices: [B, T, C], [B, K, C], [B, K, C] -> [B, T, C]."""
    if indices is None:
        return kept + branch
    return ops.scatter_add_tokens(tokens, indices, kept, branch, None, 1.0, backend=backend)


def drop(drop_path: nn.Module, branch: Tensor, images: int) -> Tensor:
    """Stochastic depth leaves out whole images; the branch is [images or images * windows, K, C]."""
    if not drop_path.training or type(drop_path) is nn.Identity:
        return branch
    return drop_path(branch.reshape(images, -1, branch.shape[2])).view_as(branch)


def finish(tokens: Tensor, indices: Tensor | None, branch: Tensor, block: Any, images: int, backend: str) -> Tensor:
    """What a pre-norm block does after attention: x + branch, then x + mlp(norm2(x)); branch [B, K, C] -> [B, T, C]."""
    branch = drop(block.drop_path1, branch, images)
    norm2 = layer_norm_parameters(block.norm2)
    if indices is not None and norm2 is not None:
        kept, y = ops.gather_add_norm(tokens, indices, branch, None, 1.0, *norm2, backend=backend)
    else:
        kept = gather(tokens, indices, backend) + branch
        y = block.norm2(kept)
    branch = drop(block.drop_path2, dense.mlp(block.mlp, y, backend), images)
    return scatter_add(tokens, indices, kept, branch, backend)
