"""VisionTransformers of every kind, small and in float64, for comparison with the masked form."""

from __future__ import annotations

import timm
import torch
from torch import nn

import idlevit_kernels.models.lvvit  # noqa: F401

SMALL = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "drop_path_rate": 0.3}


MODELS = {
    "tiny": ("vit_tiny_patch16_224", SMALL),
    "deit, 12 layers": ("deit_tiny_patch16_224", {"num_classes": 7, "img_size": 48, "drop_path_rate": 0.1}),
    "LV-ViT": ("lvvit_small_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "DeiT-III": ("deit3_small_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56, "global_pool": "avg"}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", SMALL),
    "average": ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
    "attention pooling": ("vit_base_patch16_siglip_224", SMALL | {"img_size": 96}),
    "registers alone": ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg", "reg_tokens": 2}),
    "norms on q, k": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True, "class_token": False, "global_pool": "avg"}),
    "norms everywhere": ("vit_tiny_patch16_224", SMALL | {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no biases": ("vit_tiny_patch16_224", SMALL | {"qkv_bias": False, "proj_bias": False, "norm_layer": "rmsnorm"}),
}


def make(name: str) -> nn.Module:
    timm_name, kwargs = MODELS[name]
    model = timm.create_model(timm_name, **kwargs).double()
    with torch.no_grad():  # fresh weights are so small that every logit is nearly equal
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2 if p.dim() == 1 else 0.05)
    return model
