"""One small model of each family, for what has to hold in all of them."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import transformers
from small_models import noisy
from torch import Tensor, nn

_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WINDOWS = {"img_size": 32, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "num_classes": 5}

MAKE: dict[str, Callable[[], nn.Module]] = {
    "timm ViT": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2, init_values=0.5,
        drop_path_rate=0.1, num_classes=5,
    ),
    "EVA-02": lambda: timm.create_model(
        "eva02_tiny_patch14_224", img_size=56, depth=2, embed_dim=48, num_heads=2, num_classes=5
    ),
    "Swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **_WINDOWS),
    "Swin V2": lambda: timm.create_model("swinv2_tiny_window8_256", **_WINDOWS),
    "Twins": lambda: timm.create_model(
        "twins_pcpvt_small", img_size=32, depths=(1, 1, 1), embed_dims=(16, 24, 32), num_heads=(1, 2, 4),
        mlp_ratios=(2, 2, 2), sr_ratios=(4, 2, 1), num_classes=5,
    ),
    "transformers ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**_HF), add_pooling_layer=False),
    "transformers DINOv2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**{k: v for k, v in _HF.items() if k != "intermediate_size"}, layerscale_value=0.5)
    ),
}  # fmt: skip
SEQUENCES = [name for name in MAKE if name not in ("Swin", "Swin V2", "Twins")]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MAKE[name]()
    return noisy(model, 0.1, 0.1).eval()


def image_for(name: str, batch: int = 2) -> Tensor:
    size = 56 if name == "EVA-02" else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, image: Tensor) -> Tensor:
    out = model(image)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def attention_of(block: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a block's attention."""
    name = "attn" if hasattr(block, "attn") else "attention"
    return name, getattr(block, name)
