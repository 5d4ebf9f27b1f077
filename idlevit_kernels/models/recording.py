"""What each idle layer of a model keeps of each image, recorded in a forward pass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..block import Context, IdleBlock
from ..block.latency import evaluation
from ..errors import Words, type_error, value_error
from ..versions import TorchDispatchMode
from .apply import idle_blocks


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one idle layer did with one image.

    Attributes:
        name: of the block in the model.
        kept: which tokens it computed, by place, [h, w] bool.
        scores: what ranked them, [h, w] float32; padding of windows is NaN.
    """

    name: str
    kept: Tensor
    scores: Tensor


def selections(model: nn.Module, images: Tensor) -> list[list[Layer]]:
    """What each idle layer of the model keeps of each image, in one forward pass.

    Args:
        model: idle; of a VisionTransformer or one of its kin, LV-ViT, or a Swin Transformer.
        images: as the model takes them, [B, channels, height, width].

    Returns:
        The idle layers, in order, of each image.

    Raises:
        TypeError, ValueError: the model is not idle, or its tokens have no place in the image.
    """
    if not isinstance(model, nn.Module):
        raise type_error("visualize", "model", "a torch.nn.Module", model)
    blocks = idle_blocks(model)
    if not blocks:
        raise value_error(
            "visualize", "model", "idle (call apply_idle first)", Words(f"a dense {type(model).__name__}")
        )
    recorder = _Recorder()
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: recorder.enter(name, args[0].shape))
        for name, block in blocks.items()
    ]
    try:
        with evaluation(model), recorder:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[Layer]] = [[] for _ in range(len(images))]
    for name, scores, indices in recorder.found:
        kept = torch.zeros_like(scores).scatter(1, indices, 1.0)
        places = _to_places(blocks[name], torch.stack([kept, scores], dim=2), recorder.shapes[name], images.shape)
        for layers, (on, score) in zip(found, places.cpu().movedim(3, 1).unbind(), strict=True):
            layers.append(Layer(name, on > 0, score.masked_fill(score == -torch.inf, torch.nan)))
    return found


class _Recorder(TorchDispatchMode):
    """Sees every selection, whatever the family of the model: scores go into one of these ops, indices come out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor, Tensor]] = []
        self.shapes: dict[str, torch.Size] = {}
        self._name = ""

    def enter(self, name: str, shape: torch.Size) -> None:
        self._name = name
        self.shapes[name] = shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.idlevit.select_tokens.default:
            self.found.append((self._name, args[0].float(), out))
        elif func is torch.ops.idlevit.select_gather_norm.default:
            self.found.append((self._name, args[1].float(), out[0]))
        return out


def _to_places(block: IdleBlock, values: Tensor, shape: torch.Size, images: torch.Size) -> Tensor:
    """Values of tokens [rows, T, k] of a block that was given tokens of the shape -> [B, h, w, k]."""
    if len(shape) == 4:  # a grid, cut into windows
        _, _, leave = block.form.enter(block, torch.empty(shape, device="meta"), Context.NOTHING)
        assert leave is not None
        return leave(values)
    values = values[:, block.num_prefix_tokens :]
    h = round(math.sqrt(values.shape[1] * images[2] / images[3]))
    if values.shape[0] != images[0] or h * (values.shape[1] // max(h, 1)) != values.shape[1]:
        expected = "one whose image tokens lie on a grid of the image's shape"
        raise value_error("visualize", "model", expected, Words(f"{values.shape[1]} tokens in {type(block).__name__}"))
    return values.unflatten(1, (h, -1))
