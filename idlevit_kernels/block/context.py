"""What a block is given beside its tokens: what belongs to a token, or to a pair of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """What belongs to the tokens of a call.

    Attributes:
        rope: rotary embedding of the N image tokens as timm makes it, sines before cosines: [N, D], [H, N, D] or, for
            each image, [B, 1 or H, N, D].
        grid: height and width of the tokens, for blocks that are told them.
        mask: which key a query sees, [B or 1, H or 1, T, T]: False where it sees none, or a number that is added to the
            logit (-inf, or the type's smallest number, where it sees none).
    """

    NOTHING: ClassVar[Context]
    rope: Tensor | None = None
    grid: tuple[int, int] | None = None
    mask: Tensor | None = None

    @property
    def pads(self) -> bool:
        """Whether some tokens may be padding, which ``padding_last`` ranks and ``zero_padding`` clears."""
        return self.mask is not None

    def take(self, indices: Tensor, num_prefix_tokens: int) -> Context:
        """That of the tokens at the indices [B, n], of which the first are prefix tokens."""
        if self.rope is None and self.mask is None:
            return self
        rope, mask = self.rope, self.mask
        if rope is not None:
            rope = _take_rope(rope, indices[:, num_prefix_tokens:] - num_prefix_tokens)
        return Context(rope, mask=None if mask is None else _take_pairs(mask, indices))

    def images(self, tokens: Tensor) -> int:
        """Of how many images the rows of tokens [rows, T, C] are; where they are windows, of fewer than rows."""
        return tokens.shape[0]

    def arguments(self) -> dict[str, Any]:
        """What an attention module is called with beside its tokens."""
        return {} if self.rope is None else {"rope": self.rope}

    def padding_last(self, scores: Tensor) -> Tensor:
        """Scores [rows, T] by which padding ranks below every token."""
        return scores if self.mask is None else scores.masked_fill(padding(seen(self.mask)), -torch.inf)

    def zero_padding(self, normed: Tensor, indices: Tensor | None) -> Tensor:
        """Normalised tokens [rows, n, C] with zeros where there is padding in place of a token."""
        return normed


Context.NOTHING = Context()


def seen(mask: Tensor) -> Tensor:
    """The mask [B or 1, H or 1, T, T] as a boolean one: whether the query of a row sees the key of a column."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def padding(sees: Tensor) -> Tensor:
    """Which tokens no query sees, [B or 1, T], in a mask as ``seen`` returns it."""
    return ~sees.any(2).any(1)


def _take_pairs(mask: Tensor, indices: Tensor) -> Tensor:
    """mask [B or 1, H or 1, T, T] at indices [B, n] -> [B, H or 1, n, n]."""
    image = torch.arange(mask.shape[0], device=mask.device)[:, None, None]  # [B or 1, 1, 1]
    return mask.permute(0, 2, 3, 1)[image, indices[:, :, None], indices[:, None, :]].permute(0, 3, 1, 2)


def _take_rope(rope: Tensor, kept: Tensor) -> Tensor:
    """rope [..., N, D] at kept [B, K] -> [B, 1 or H, K, D]."""
    if rope.dim() == 2:
        return rope[kept].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, kept].transpose(0, 1)
    return rope.gather(2, kept[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
