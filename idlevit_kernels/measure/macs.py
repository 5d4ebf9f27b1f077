"""Multiply-accumulates of a model, by torch's own FLOP counter."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import type_error, value_error
from ..models.family import encoders
from ..models.inputs import default_input_size
from ..ops.flops import register_flop_formulas
from ..versions import HOOKS


@dataclasses.dataclass(frozen=True)
class MacReport:
    """Multiply-accumulates of one image.

    Attributes:
        total: of the whole model.
        per_layer: by name of each transformer block or other direct child of the model, in the order they run.
    """

    total: int
    per_layer: dict[str, int]


def count_macs(model: nn.Module, input_size: tuple[int, ...] | None = None) -> MacReport:
    """Counts convolutions, linear layers and the two products of attention of one forward pass, and nothing else.

    The pass runs on meta tensors: no weights are read, nothing is computed, the model is not changed. What
    ``torch.utils.flop_counter`` reports for a real pass is twice these numbers.

    Args:
        model: any module that takes one image batch.
        input_size: (channels, height, width) of an image; by default what the model's patch embedding was built for,
            (3, 224, 224) where it does not say.

    Raises:
        TypeError, ValueError: model is no module; input_size is not three positive integers.
    """
    if not isinstance(model, nn.Module):
        raise type_error("count_macs", "model", "a torch.nn.Module", model)
    if input_size is None:
        input_size = default_input_size(model)
    if len(input_size) != 3 or any(not isinstance(s, int) or s < 1 for s in input_size):
        raise value_error("count_macs", "input_size", "(channels, height, width), positive integers", input_size)
    register_flop_formulas()
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters(), torch.empty(0))
    on_meta = _on_meta(model).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        on_meta(torch.empty((1, *input_size), device="meta", dtype=parameter.dtype))
    counts = counter.get_flop_counts()
    root = type(on_meta).__name__
    macs = {name: sum(flops.values()) // 2 for name, flops in counts.items()}
    per_layer: dict[str, int] = defaultdict(int)
    for name in _layers(on_meta):
        if macs.get(f"{root}.{name}"):
            per_layer[name] = macs[f"{root}.{name}"]
    return MacReport(counter.get_total_flops() // 2, dict(per_layer))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without weights or hooks: hooks are the user's, hold what cannot be copied, and see real passes only."""
    memo: dict[int, Any] = {}
    for t in itertools.chain(model.parameters(), model.buffers()):
        on_meta = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(on_meta, t.requires_grad) if isinstance(t, nn.Parameter) else on_meta
    for module in model.modules():
        for name in HOOKS:
            hooks = module.__dict__.get(name)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
    return copy.deepcopy(model, memo)


def _layers(model: nn.Module) -> list[str]:
    """The transformer blocks, and direct children; sequences, lists and stages, which hold a sequence or list named
    ``blocks``, are opened, and so is what an encoder stands in."""
    blocks = {block for encoder in encoders(model) for block in encoder.blocks}
    containers = nn.Sequential, nn.ModuleList

    def walk(parent: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in parent.named_children():
            held = isinstance(child, containers) or isinstance(getattr(child, "blocks", None), containers)
            if child not in blocks and (held or any(module in blocks for module in child.modules())):
                yield from walk(child, f"{prefix}{name}.")
            else:
                yield prefix + name

    return list(walk(model, ""))
