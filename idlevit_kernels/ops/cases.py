"""A problem that an op is tried on: its sizes, the tensors drawn for it, and the bytes that they take."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from .dtypes import accumulate_dtype

_INDEX_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: B images, P prefix and N image tokens, C channels, K kept; how x lies in memory; what scores are."""

    B: int
    N: int
    C: int
    K: int
    P: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # or: offset (a view inside a larger tensor), transposed (channels not contiguous)
    scores: str = "random"  # or: ties, special (NaN, infinities, both zeros), equal

    @property
    def T(self) -> int:
        return self.P + self.N

    @property
    def n(self) -> int:
        return self.P + self.K

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.B, self.T, self.n, self.C, self.dtype)

    def __str__(self) -> str:
        return (
            f"B{self.B}-T{self.T}-P{self.P}-C{self.C}-K{self.K}-{str(self.dtype).removeprefix('torch.')}"
            f"-{self.layout}-{self.scores}"
        )


class Draw(Protocol):
    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers of that shape, in the type of the case."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is drawn for a case; an op's record makes arguments of it."""

    case: Case
    x: Tensor  # [B, T, C], in the layout of the case
    scores: Tensor  # [B, T]
    norm: tuple[Tensor, Tensor, float]  # weight [C], bias [C], eps
    gamma: Tensor  # [C]
    indices: Tensor  # [B, n], of the scores
    tokens: Tensor  # [B, n, C]
    branch: Tensor  # [B, n, C]
    random: Draw

    @property
    def counts(self) -> tuple[int, int]:
        """num_keep, num_prefix_tokens"""
        return self.case.K, self.case.P


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of what a call with B images, T tokens, n kept ones and C channels reads and writes."""

    B: int
    T: int
    n: int
    C: int
    dtype: torch.dtype

    @property
    def image(self) -> int:
        """[B, T, C]"""
        return self.B * self.T * self.vector

    @property
    def kept(self) -> int:
        """[B, n, C]"""
        return self.B * self.n * self.vector

    @property
    def idle(self) -> int:
        """[B, T - n, C]"""
        return self.image - self.kept

    @property
    def vector(self) -> int:
        """[C]"""
        return self.C * self.dtype.itemsize

    @property
    def scores(self) -> int:
        """[B, T] in the accumulate type"""
        return self.B * self.T * accumulate_dtype(self.dtype).itemsize

    @property
    def indices(self) -> int:
        """[B, n]"""
        return self.B * self.n * _INDEX_BYTES
