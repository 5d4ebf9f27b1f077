"""The models that a recipe names, with the weights that it starts from."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ArgumentValueError, value_error
from ..models import load_released
from ..models.create import check_model_name
from .data import Digits
from .recipe import Recipe


def digits_vit(num_classes: int = 10) -> nn.Module:
    """A timm VisionTransformer for ``Digits``: 36 tokens of 2 x 2 pixels, 4 layers, 48 channels, a convolutional stem.

    The stem is what lets so small a model learn from a thousand images in a minute; LV-ViT has one, too.
    """
    from timm.layers import LayerNorm2d, PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    class Stem(PatchEmbed):
        def __init__(self, in_chans: int = 3, embed_dim: int = 768, **options: Any):
            super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options)
            half = embed_dim // 2
            self.proj = nn.Sequential(  # type: ignore[assignment]
                nn.Conv2d(in_chans, half, 3, padding=1),
                LayerNorm2d(half),
                nn.GELU(),
                nn.Conv2d(half, embed_dim, 3, stride=self.patch_size[0], padding=1),
            )

    channels, size, _ = Digits.INPUT_SIZE
    return VisionTransformer(
        img_size=size,
        patch_size=2,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=48,
        depth=4,
        num_heads=3,
        mlp_ratio=2,
        embed_layer=Stem,
    )


def create_model(recipe: Recipe, num_classes: int | None, weights: str | None) -> nn.Module:
    """The dense model.

    Args:
        num_classes: of the classifier; None for what the model was made for.
        weights: "pretrained" for timm's, a file as ``load_released`` reads it, or None for random ones.

    Raises:
        ValueError, OSError: no such model or weights, or weights that do not fit; the message says which.
    """
    if recipe.model == "digits_vit":
        if weights == "pretrained":
            raise value_error("train", "weights", "dense, none or a file: nobody pretrained digits_vit", weights)
        model = digits_vit(10 if num_classes is None else num_classes)
    else:
        import timm

        check_model_name("train", recipe.model)
        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        if recipe.image_size is not None:
            options["img_size"] = recipe.image_size
        try:
            model = timm.create_model(recipe.model, pretrained=weights == "pretrained", **options)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            what = f"{recipe.model} with {'pretrained weights' if weights == 'pretrained' else 'random weights'}"
            hint = " Pass --weights FILE to start from a file." if weights == "pretrained" else ""
            raise ArgumentValueError(f"train: timm cannot make {what}, {options}: {error}.{hint}") from error
    if weights not in (None, "pretrained"):
        load_released(model, weights)
    return model
