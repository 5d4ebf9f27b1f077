"""timm's VisionTransformer: DeiT, ViT, DeiT-III, DINOv2, CLIP, SigLIP, this package's LV-ViT and their kin."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..block import IdleBlock, IdleSequential, take_over, unfit

NAME = "timm VisionTransformer (LV-ViT of this package, too)"
IDLE_BLOCK = IdleBlock


def find(model: Any) -> nn.Module | None:
    """The VisionTransformer in the model (itself, or what ``features_only`` wraps); None if there is none."""
    timm_vit = sys.modules.get("timm.models.vision_transformer")
    if timm_vit is None:  # no timm model can exist
        return None
    if type(model).__name__ == "FeatureGetterNet":
        model = model.model
    return model if isinstance(model, timm_vit.VisionTransformer) else None


def blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    idle = any(isinstance(block, IdleBlock) for block in blocks)
    sequence = IdleSequential(*blocks) if idle else nn.Sequential(*blocks)
    take_over(sequence, model.blocks)
    model.blocks = sequence


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


def reasons(model: Any) -> list[str]:
    """Why this model cannot idle; empty if it can."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    found: dict[str, None] = {}  # ordered, once each
    block: Any
    for block in blocks(model):
        name = type(block).__name__
        if isinstance(block, IdleBlock):
            continue
        reason = unfit(block)
        if type(block).forward is Block.forward and type(block.attn).forward is not Attention.forward:
            found[f"its attention is {type(block.attn).__name__}, which is not timm's softmax Attention"] = None
        elif reason is not None:
            found[f"its blocks are {reason}"] = None
        elif type(block).forward is not Block.forward:
            found[f"its blocks are {name}, whose forward is not that of timm's pre-norm Block"] = None
    return list(found)
