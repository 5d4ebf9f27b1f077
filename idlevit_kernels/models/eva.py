"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT and other rotary and gated Vision Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..block.context import Context
from .family import Family, places
from .vit import PreNormForm, refuse_masks


class EvaForm(PreNormForm):
    """timm's EvaBlock: the pre-norm block with LayerScale as its own parameters and a rotary embedding beside x."""

    kinds = ("EvaBlock",)

    def context(  # type: ignore[override]
        self, block: Any, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Context:
        refuse_masks(attn_mask, is_causal)
        return Context.NOTHING if rope is None else Context(rope)

    def arguments(self, context: Context) -> dict[str, Any]:
        return {"rope": context.rope}


class Evas(Family):
    name = "timm Eva (EVA-02, DINOv3, ...)"
    forms = (EvaForm(),)

    def find(self, model: nn.Module) -> list[Any]:
        return places(model, "Eva")

    def blocks(self, place: Any) -> list[nn.Module]:
        return list(place.blocks)

    def num_prefix_tokens(self, place: Any) -> int:
        return place.num_prefix_tokens

    def default_scorer(self, place: Any) -> str:
        """Registers alone are no class token."""
        return "mean" if place.cls_token is None else "cls"

    def embed(self, place: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """[B, 3, H, W] -> the tokens that enter the first block, [B, T, C], and what else each block is called with."""
        x, rope = place._pos_embed(place.patch_embed(images))
        ropes = rope if getattr(place, "rope_mixed", False) and rope is not None else [rope] * len(place.blocks)
        return place.norm_pre(x), [{"rope": rope} for rope in ropes]

    def head(self, place: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features, as in ``IdleViTOutput``, from the last block's tokens."""
        features = place.forward_head(place.norm(x), pre_logits=True)
        return place.head(features), features
