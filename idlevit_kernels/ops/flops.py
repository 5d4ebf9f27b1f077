"""What the matrix products of the ops cost, for torch's FLOP counter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..versions import attention_ops, count_flops, onednn_linear_op
from .library import RECORDS


@functools.cache
def register_flop_formulas() -> None:
    """Tells torch's FLOP counter of the matrix products that it does not know; a counter made earlier misses them.

    Not at import: the counter's module imports triton.
    """
    from torch.utils.flop_counter import flop_registry

    def linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]

    def formula(macs: Callable[..., int]) -> Callable[..., int]:
        return lambda *shapes, **_: 2 * macs(*shapes)

    for op in RECORDS.values():
        if op.macs is not None:
            count_flops(getattr(torch.ops.idlevit, op.name), formula(op.macs))
    if onednn_linear_op() is not None:
        count_flops(onednn_linear_op(), linear)
    # The attention that scaled_dot_product_attention takes on a CPU; older versions of torch count only CUDA's.
    for on_cpu, on_cuda in attention_ops():
        if on_cuda in flop_registry:
            flop_registry.setdefault(on_cpu, flop_registry[on_cuda])
