"""timm's VisionTransformer: DeiT, ViT, DeiT-III, DINOv2, CLIP, SigLIP, this package's LV-ViT and their kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..block.api import IdleBlock, IdleSequential, take_place
from ..block.attention import find_attention, why_no_keys
from ..block.context import Context
from ..block.mlp import find_mlp
from ..block.parts import Form, Parts, Watch, definer, find_branch, find_kind, find_norm
from ..errors import value_error
from ..versions import compiled_in_place
from .family import Family, places

# Parameters outside any sub-module whose use is known: LayerScale in EVA's blocks.
_OWN_PARAMETERS = {"gamma_1", "gamma_2"}


class PreNormForm(Form):
    """timm's pre-norm Block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    kinds: tuple[str | type, ...] = ("Block",)

    def why_unsupported(self, block: Any) -> str | None:
        name = type(block).__name__
        missing = [part for part in ("norm1", "attn", "norm2", "mlp") if not hasattr(block, part)]
        if missing:
            return f"{name} has no {', '.join(missing)}"
        unknown = sorted(set(block._parameters) - _OWN_PARAMETERS)
        if unknown:
            return f"{name} has parameters of its own ({', '.join(unknown)}), whose use is not known"
        return why_no_keys(block.attn)

    def parts(self, block: Any, watch: Watch) -> Parts:
        def look(name: str) -> Any:
            return watch.value(block, name)

        return Parts(
            find_norm(look("norm1"), watch),
            find_attention(look("attn"), watch),
            find_branch(watch, look("drop_path1"), look("ls1"), look("gamma_1")),
            find_norm(look("norm2"), watch),
            find_mlp(look("mlp"), watch),
            find_branch(watch, look("drop_path2"), look("ls2"), look("gamma_2")),
            watch,
            self,
        )

    def context(  # type: ignore[override]
        self, block: Any, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Context:
        refuse_masks(attn_mask, is_causal)
        return Context.NOTHING


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None:
        raise value_error("IdleBlock", "attn_mask", "None: idle tokens need full attention", attn_mask)
    if is_causal:
        raise value_error("IdleBlock", "is_causal", "False: idle tokens need full attention", is_causal)


class VisionTransformers(Family):
    name = "timm VisionTransformer (LV-ViT of this package, too)"
    forms = (PreNormForm(),)

    def find(self, model: nn.Module) -> list[Any]:
        return places(model, "VisionTransformer")

    def blocks(self, place: Any) -> list[nn.Module]:
        return list(place.blocks)

    def set_blocks(self, place: Any, blocks: list[nn.Module]) -> None:
        present = place.blocks
        if type(present) is not nn.Sequential or "forward" in present.__dict__ or compiled_in_place(present):
            super().set_blocks(place, blocks)  # a container of somebody's own goes on to be called
            return
        sequence = IdleSequential(*blocks)
        take_place(sequence, present)
        place.blocks = sequence

    def num_prefix_tokens(self, place: Any) -> int:
        return place.num_prefix_tokens

    def default_scorer(self, place: Any) -> str:
        """Registers alone are no class token."""
        return "cls" if place.has_class_token else "mean"

    def why_unsupported(self, place: Any) -> str | None:
        for block in place.blocks:
            if not isinstance(block, IdleBlock) and definer(type(block.attn)) is not find_kind("Attention"):
                return f"its attention is {type(block.attn).__name__}, which is not timm's softmax Attention"
        return None

    def embed(self, place: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """[B, 3, H, W] -> the tokens that enter the first block, [B, T, C], and what else each block is called with."""
        x = place.norm_pre(place.patch_drop(place._pos_embed(place.patch_embed(images))))
        return x, [{} for _ in place.blocks]

    def head(self, place: Any, x: Tensor) -> tuple[Any, Tensor]:
        """Logits and features, as in ``IdleViTOutput``, from the last block's tokens."""
        x = place.norm(x)
        if hasattr(place, "aux_head"):  # LV-ViT classifies from all tokens
            return place.forward_head(x), x
        if hasattr(place, "head_dist"):
            return place.forward_head(x), x[:, 0]
        features = place.forward_head(x, pre_logits=True)
        return place.head(features), features
