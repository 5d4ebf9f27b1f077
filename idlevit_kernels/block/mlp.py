"""The MLP of a block: timm's, written out where its formula is known and nobody watches; any other is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .linear import Linear, gelu_linear, linear_gelu, recompute_gelu
from .parts import Watch, find_linear, find_optional


@dataclasses.dataclass(eq=False)
class Mlp:
    """fc2(norm(drop1(act(fc1(y))))), then drop2; where ``gated``, fc1 gives two halves of which one is a gate.

    ``approximate`` is that of GELU, None for another activation.
    """

    fc1: Linear
    act: Any
    approximate: str | None
    drop1: Any
    norm: Any
    fc2: Linear
    drop2: Any
    gated: bool
    gate_last: bool

    def __call__(self, y: Tensor) -> Tensor:
        fc1, fc2, gelu = self.fc1, self.fc2, self.approximate
        if gelu is None or self.drop1 is not None or self.norm is not None:
            out = fc2(self._hidden(y))
        elif torch.is_grad_enabled() and fc2.plain and fc2.weight is not None and recompute_gelu():
            out = gelu_linear(fc1(y), fc2.weight, fc2.bias, gelu)
        elif fc1.plain and fc1.weight is not None:
            out = fc2(linear_gelu(y, fc1, gelu))
        else:
            out = fc2(self.act(fc1(y)))
        return out if self.drop2 is None else self.drop2(out)

    def _hidden(self, y: Tensor) -> Tensor:
        fc1 = self.fc1
        if self.gated:
            first, second = fc1(y).chunk(2, -1)
            hidden = first * self.act(second) if self.gate_last else self.act(first) * second
        else:
            hidden = self.act(fc1(y))
        if self.drop1 is not None:
            hidden = self.drop1(hidden)
        return hidden if self.norm is None else self.norm(hidden)


def find_mlp(module: Any, watch: Watch) -> Any:
    """What computes it, [B, n, C] -> [B, n, C]."""
    if watch.is_plain(module, "Mlp", "GluMlp"):
        fc1, fc2 = (find_linear(watch.value(module, name), watch) for name in ("fc1", "fc2"))
        drop1, norm, drop2 = (find_optional(watch.value(module, name), watch) for name in ("drop1", "norm", "drop2"))
        act = watch.value(module, "act")
        gated = watch.is_a(module, "GluMlp")
        gelu = watch.value(act, "approximate") if not gated and watch.is_plain(act, "GELU") else None
        gate_last, axis = bool(watch.value(module, "gate_last")), watch.value(module, "chunk_dim")
        if not gated or axis == -1:
            return Mlp(fc1, act, gelu, drop1, norm, fc2, drop2, gated, gate_last)
    return module
