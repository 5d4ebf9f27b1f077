"""The smallest model that most tests need, and weights that show every mistake."""

from __future__ import annotations

from typing import Any, TypeVar

import timm
import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

SMALL = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10}


def tiny(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A dense model in evaluation mode: 16 image tokens, four layers, ten classes unless ``options`` say otherwise."""
    return timm.create_model(name, **SMALL | options).eval()


@torch.no_grad()
def noisy(model: Model, vectors: float = 0.1, others: float = 0.02) -> Model:
    """Noise on every parameter: fresh ones are so small that tokens score alike and a wrong branch hardly shows.

    Args:
        vectors: how much on biases, norms and other parameters of one dimension.
        others: how much on matrices and convolutions.
    """
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=vectors if p.dim() == 1 else others)
    return model
