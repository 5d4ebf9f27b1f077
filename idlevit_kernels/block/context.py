"""What a block is given beside its tokens: what belongs to a token, or to a pair of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """What belongs to the tokens of a call.

    Attributes:
        rope: rotary embedding of the N image tokens as timm makes it, sines before cosines: [N, D], [H, N, D] or, for
            each image, [B, 1 or H, N, D].
        grid: height and width of the tokens, for blocks that are told them.
    """

    NOTHING: ClassVar[Context]
    pads: ClassVar[bool] = False  # whether some tokens may be padding, which ``zero_padding`` clears

    rope: Tensor | None = None
    grid: tuple[int, int] | None = None

    def take(self, indices: Tensor, num_prefix_tokens: int) -> Context:
        """That of the tokens at the indices [B, n], of which the first are prefix tokens."""
        if self.rope is None:
            return self
        return Context(_take_rope(self.rope, indices[:, num_prefix_tokens:] - num_prefix_tokens))

    def images(self, tokens: Tensor) -> int:
        """Of how many images the rows of tokens [rows, T, C] are; where they are windows, of fewer than rows."""
        return tokens.shape[0]

    def arguments(self) -> dict[str, Any]:
        """What an attention module is called with beside its tokens."""
        return {} if self.rope is None else {"rope": self.rope}

    def padding_last(self, scores: Tensor) -> Tensor:
        """Scores [rows, T] by which padding ranks below every token."""
        return scores

    def zero_padding(self, normed: Tensor, indices: Tensor | None) -> Tensor:
        """Normalised tokens [rows, n, C] with zeros where there is padding in place of a token."""
        return normed


Context.NOTHING = Context()


def _take_rope(rope: Tensor, kept: Tensor) -> Tensor:
    """rope [..., N, D] at kept [B, K] -> [B, 1 or H, K, D]."""
    if rope.dim() == 2:
        return rope[kept].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, kept].transpose(0, 1)
    return rope.gather(2, kept[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
