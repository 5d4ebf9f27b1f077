"""Multiply-accumulates of a model, by torch's own FLOP counter."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .errors import type_error, value_error
from .versions import HOOKS, attention_ops, count_flops, onednn_linear_op


@functools.cache
def register_flop_formulas() -> None:
    """Tells torch's FLOP counter of the matrix products that it does not know; a counter made earlier misses them.

    Not at import: the counter's module imports triton.
    """
    from torch.utils.flop_counter import flop_registry

    def linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    def cls_direction(x: torch.Size, *arguments: Any, **_: Any) -> int:
        qkv_weight = arguments[3]
        return 2 * 2 * x[0] * x[2] * (qkv_weight[0] // 3)

    count_flops(torch.ops.idlevit.cls_direction, cls_direction)
    if onednn_linear_op() is not None:
        count_flops(onednn_linear_op(), linear)
    # The attention that scaled_dot_product_attention takes on a CPU; older versions of torch count only CUDA's.
    for on_cpu, on_cuda in attention_ops():
        if on_cuda in flop_registry:
            flop_registry.setdefault(on_cpu, flop_registry[on_cuda])


@dataclasses.dataclass(frozen=True)
class MacReport:
    """Multiply-accumulates of one image.

    Attributes:
        total: of the whole model.
        per_layer: by name of each transformer block or other direct child of the model, in the order they run.
    """

    total: int
    per_layer: dict[str, int]


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) that the model's patch embedding was built for; (3, 224, 224) where it does not say."""
    embed = getattr(getattr(model, "model", model), "patch_embed", None)
    first = (
        next((m for m in embed.modules() if isinstance(m, nn.Conv2d)), None) if isinstance(embed, nn.Module) else None
    )
    channels = 3 if first is None else first.in_channels
    size = getattr(embed, "img_size", None)
    size = size or getattr(getattr(model, "config", None), "image_size", None) or 224  # a transformers model
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


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
    for name, _ in _layers(on_meta):
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


def _layers(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Direct children; sequences, lists and stages, which hold a sequence or list named ``blocks``, are opened."""
    found: list[tuple[str, nn.Module]] = []
    containers = nn.Sequential, nn.ModuleList
    for name, child in model.named_children():
        if isinstance(child, containers) or isinstance(getattr(child, "blocks", None), containers):
            found.extend(_layers(child, f"{prefix}{name}."))
        else:
            found.append((prefix + name, child))
    return found
