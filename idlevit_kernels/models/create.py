"""timm models by name, this package's LV-ViT among them."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentTypeError, value_error


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def check_model_name(op: str, name: str) -> None:
    import timm

    from . import lvvit  # noqa: F401  registers its names with timm

    if not timm.is_model(name):
        names = timm.list_models()
        close = [known for known in names if name in known][:3] or difflib.get_close_matches(name, names)
        hint = f"close to it: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise value_error(op, "model", f"the name of a timm model ({hint})", name)


def create_model(
    op: str, name: str, image_size: int | None = None, pretrained: bool = False
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The timm model, with random weights unless pretrained, and the size of its input. Errors name ``op``."""
    import timm

    check_model_name(op, name)
    if image_size is not None and image_size < 1:
        raise value_error(op, "image_size", "at least 1", image_size)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ArgumentTypeError(f"{op}: timm cannot make {name} with {options}: {error}") from error
    channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
    return model, (channels, image_size or height, image_size or width)
