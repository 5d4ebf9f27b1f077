"""What enters a model, and with it what enters its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..block.latency import BlockInput, evaluation
from ..errors import ArgumentValueError


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(channels, height, width) that the model's patch embedding was built for; (3, 224, 224) where it does not say."""
    embeds = (module._modules.get("patch_embed") for module in model.modules())
    embed = next((embed for embed in embeds if embed is not None), None)
    first = None if embed is None else next((m for m in embed.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    size = getattr(embed, "img_size", None)
    size = size or getattr(getattr(model, "config", None), "image_size", None) or 224  # a transformers model
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def block_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batch: int, input_size: tuple[int, ...] | None = None
) -> list[BlockInput]:
    """What enters each block in a forward pass on images of the size, the model's own by default."""
    found: dict[nn.Module, BlockInput] = {}

    def record(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[block] = BlockInput(tuple(args[0].shape), args[1:], named)

    like = next(model.parameters())
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with evaluation(model):
            size = input_size or default_input_size(model)
            model(torch.randn((batch, *size), device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    missing = sum(block not in found for block in blocks)
    if missing:
        raise ArgumentValueError(
            f"{type(model).__name__} must run all its blocks on one batch of images, so that they can be timed, got one"
            f" that does not run {missing} of {len(blocks)}"
        )
    return [found[block] for block in blocks]
