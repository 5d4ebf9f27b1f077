"""timm's VisionTransformer: DeiT, ViT, DeiT-III, DINOv2, CLIP, SigLIP, this package's LV-ViT and their kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..block.api import IdleSequential, give_back, take_place
from ..block.attention import find_attention, why_no_keys
from ..block.context import Context
from ..block.mlp import find_mlp
from ..block.parts import Entered, Parts, Watch, definer, find_branch, find_kind, find_norm, register_form
from ..errors import value_error
from ..versions import compiled_in_place, library_class

NAME = "timm VisionTransformer (LV-ViT of this package, too)"

# Parameters outside any sub-module whose use is known: LayerScale in EVA's blocks.
_OWN_PARAMETERS = {"gamma_1", "gamma_2"}


class PreNormForm:
    """timm's pre-norm Block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    blocks: tuple[str, ...] = ("Block",)
    sequence = True
    alone: Context | None = Context.NOTHING

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

    def context(self, block: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Context:
        refuse_masks(attn_mask, is_causal)
        return Context.NOTHING

    def arguments(self, context: Context) -> dict[str, Any]:
        return {}

    def enter(self, block: Any, x: Tensor, context: Context) -> Entered:
        return x, context, None


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None:
        raise value_error("IdleBlock", "attn_mask", "None: idle tokens need full attention", attn_mask)
    if is_causal:
        raise value_error("IdleBlock", "is_causal", "False: idle tokens need full attention", is_causal)


register_form(PreNormForm())


def find(model: Any) -> nn.Module | None:
    """The VisionTransformer in the model (itself, or what ``features_only`` wraps); None if there is none."""
    kind: Any = library_class("VisionTransformer")
    if kind is None:  # no timm model can exist
        return None
    if type(model).__name__ == "FeatureGetterNet":
        model = model.model
    return model if isinstance(model, kind) else None


def blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    present = model.blocks
    if type(present) is not nn.Sequential or "forward" in present.__dict__ or compiled_in_place(present):
        for i, block in enumerate(blocks):  # a container of somebody's own goes on to be called
            present[i] = block
        return
    sequence = IdleSequential(*blocks)
    take_place(sequence, present)
    model.blocks = sequence


def unset_blocks(model: Any) -> None:
    """After ``remove_idle`` has put back the blocks."""
    if isinstance(model.blocks, IdleSequential):
        model.blocks = give_back(model.blocks, nn.Sequential, ("_dense",))


def num_prefix_tokens(model: Any) -> int:
    return model.num_prefix_tokens


def embed(model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """[B, 3, H, W] -> the tokens that enter the first block, [B, T, C], and what else each block is called with."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), [{} for _ in model.blocks]


def head(model: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Logits and features, as in ``IdleViTOutput``, from the last block's tokens."""
    x = model.norm(x)
    if hasattr(model, "aux_head"):  # LV-ViT classifies from all tokens
        return model.forward_head(x), x
    if hasattr(model, "head_dist"):
        return model.forward_head(x), x[:, 0]
    features = model.forward_head(x, pre_logits=True)
    return model.head(features), features


def default_scorer(model: Any) -> str:
    """Registers alone are no class token."""
    return "cls" if model.has_class_token else "mean"


def why_not(block: Any) -> str | None:
    """Beyond the block's own reasons: why its place in such a model rules idling out."""
    if definer(type(block.attn)) is not find_kind("Attention"):
        return f"its attention is {type(block.attn).__name__}, which is not timm's softmax Attention"
    return None
