"""The staircase that decides K: at which numbers of kept tokens a block gets faster.

A kernel computes whole tiles, so a few tokens more often cost nothing; and where calls cost more than arithmetic (a
small batch on a large GPU) idling does not pay at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# What takes less than this less is not faster: the noise of a few samples.
_RELEVANT = 0.02


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
