"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT and other rotary and gated Vision Transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..block import IdleBlock, take_over, unfit

NAME = "timm Eva (EVA-02, DINOv3, ...)"
IDLE_BLOCK = IdleBlock


def find(model: Any) -> nn.Module | None:
    """The Eva in the model (itself, or what ``features_only`` wraps); None if there is none."""
    timm_eva = sys.modules.get("timm.models.eva")
    if timm_eva is None:  # no timm model can exist
        return None
    if type(model).__name__ == "FeatureGetterNet":
        model = model.model
    return model if isinstance(model, timm_eva.Eva) else None


def blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    new = nn.ModuleList(blocks)
    take_over(new, model.blocks)
    model.blocks = new


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


def reasons(model: Any) -> list[str]:
    """Why this model cannot idle; empty if it can."""
    from timm.models.eva import EvaBlock

    found: dict[str, None] = {}  # ordered, once each
    block: Any
    for block in blocks(model):
        if isinstance(block, IdleBlock):
            continue
        reason = unfit(block)
        if reason is None and type(block).forward is not EvaBlock.forward:
            reason = f"{type(block).__name__}, whose forward is not that of timm's EvaBlock"
        if reason is not None:
            found[f"its blocks are {reason}"] = None
    return list(found)
