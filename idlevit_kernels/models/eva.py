"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT and other rotary and gated Vision Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..block.context import Context
from ..block.parts import register_form
from ..versions import library_class
from .vit import PreNormForm, refuse_masks

NAME = "timm Eva (EVA-02, DINOv3, ...)"


class EvaForm(PreNormForm):
    """timm's EvaBlock: the pre-norm block with LayerScale as its own parameters and a rotary embedding beside x."""

    blocks: tuple[str, ...] = ("EvaBlock",)

    def context(  # type: ignore[override]
        self, block: Any, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Context:
        refuse_masks(attn_mask, is_causal)
        return Context.NOTHING if rope is None else Context(rope)

    def arguments(self, context: Context) -> dict[str, Any]:
        return {"rope": context.rope}


register_form(EvaForm())


def find(model: Any) -> nn.Module | None:
    """The Eva in the model (itself, or what ``features_only`` wraps); None if there is none."""
    kind: Any = library_class("Eva")
    if kind is None:  # no timm model can exist
        return None
    if type(model).__name__ == "FeatureGetterNet":
        model = model.model
    return model if isinstance(model, kind) else None


def blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    for i, block in enumerate(blocks):
        model.blocks[i] = block


def num_prefix_tokens(model: Any) -> int:
    return model.num_prefix_tokens


def embed(model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """[B, 3, H, W] -> the tokens that enter the first block, [B, T, C], and what else each block is called with."""
    x, rope = model._pos_embed(model.patch_embed(images))
    ropes = rope if getattr(model, "rope_mixed", False) and rope is not None else [rope] * len(model.blocks)
    return model.norm_pre(x), [{"rope": rope} for rope in ropes]


def head(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features, as in ``IdleViTOutput``, from the last block's tokens."""
    features = model.forward_head(model.norm(x), pre_logits=True)
    return model.head(features), features


def default_scorer(model: Any) -> str:
    """Registers alone are no class token."""
    return "mean" if model.cls_token is None else "cls"
