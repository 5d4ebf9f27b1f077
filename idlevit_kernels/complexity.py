"""Multiply-accumulates of a model, by torch's own FLOP counter."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclasses.dataclass(frozen=True)
class MacReport:
    """Multiply-accumulates of one image.

    Attributes:
        total: of the whole model.
        per_layer: by name of each transformer block or other direct child of the model, in the order they run.
    """

    total: int
    per_layer: dict[str, int]


def count_macs(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> MacReport:
    """Counts convolutions, linear layers and the two products of attention of one forward pass, and nothing else.

    The pass runs on meta tensors: no weights are read, nothing is computed, the model is not changed. What
    ``torch.utils.flop_counter`` reports for a real pass is twice these numbers.

    Args:
        model: any module that takes one image batch.
        input_size: (channels, height, width) of an image.

    Raises:
        ValueError: input_size is not three positive integers.
    """
    if len(input_size) != 3 or any(not isinstance(s, int) or s < 1 for s in input_size):
        from .errors import value_error

        raise value_error("count_macs", "input_size", "(channels, height, width), positive integers", input_size)
    parameter = next(model.parameters(), torch.empty(0))
    on_meta = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False, depth=None)
    with torch.no_grad(), counter:
        on_meta(torch.empty((1, *input_size), device="meta", dtype=parameter.dtype))
    counts = counter.get_flop_counts()
    root = type(on_meta).__name__
    macs = {name: sum(flops.values()) // 2 for name, flops in counts.items()}
    per_layer: dict[str, int] = defaultdict(int)
    for name, _ in _layers(on_meta):
        if macs.get(f"{root}.{name}"):
            per_layer[name] = macs[f"{root}.{name}"]
    return MacReport(counter.get_total_flops() // 2, dict(per_layer))


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Direct children, with sequences and lists opened."""
    found = []
    for name, child in model.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            found.extend((f"{name}.{key}", layer) for key, layer in child.named_children())
        else:
            found.append((name, child))
    return found
