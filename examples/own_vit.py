"""Teaches apply_idle a Vision Transformer of one's own: its class, the family that describes it, and what that gives.

python examples/own_vit.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.block import CalledAttention, Form, Parts, Watch, find_branch, find_norm
from idlevit_kernels.models.family import places

# A model as it may stand in somebody's code: timm is not needed, no name is the usual one.


class OwnAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.to_qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = OwnAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.before_attention(tokens))
        return tokens + self.mlp(self.before_mlp(tokens))


class OwnViT(nn.Module):
    def __init__(
        self, size: int = 64, patch: int = 8, width: int = 64, depth: int = 8, heads: int = 4, classes: int = 10
    ):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) / 10)
        self.layers = nn.ModuleList(OwnLayer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


# What apply_idle has to know of it.


class OwnForm(Form):
    """How a layer is made up. Every attribute is read through the watch, so that a change is noticed."""

    kinds = (OwnLayer,)

    def parts(self, block: Any, watch: Watch) -> Parts:
        attn, mlp = watch.value(block, "attention"), watch.value(block, "mlp")
        watch.is_watched(mlp)
        heads, qkv = watch.value(attn, "heads"), watch.value(attn, "to_qkv")
        return Parts(
            norm1=find_norm(watch.value(block, "before_attention"), watch),
            attention=CalledAttention(attn, watch, heads, (qkv,)),
            branch1=find_branch(watch),
            norm2=find_norm(watch.value(block, "before_mlp"), watch),
            mlp=mlp,
            branch2=find_branch(watch),
            watch=watch,
            form=self,
        )


class OwnFamily(ik.Family):
    """Where the layers stand in a model, and how many tokens are not the image's."""

    name = "my ViT"
    forms = (OwnForm(),)

    def find(self, model: nn.Module) -> list[Any]:
        return places(model, OwnViT)

    def blocks(self, place: Any) -> list[nn.Module]:
        return list(place.layers)

    def num_prefix_tokens(self, place: Any) -> int:
        return 1


def main() -> None:
    ik.register_family(OwnFamily())
    model, images = OwnViT().eval(), torch.randn(2, 3, 64, 64)
    dense = ik.count_macs(model, (3, 64, 64)).total
    with torch.inference_mode():
        logits = model(images)
        ik.apply_idle(model, keep_ratio=1.0)
        print(f"keep ratio 1.0 against dense: {(model(images) - logits).abs().max():.1e}")
        ik.set_keep_ratio(model, 0.7)
        idle = ik.count_macs(model, (3, 64, 64)).total
        print(f"keep ratio 0.7: {dense / 1e6:.1f} -> {idle / 1e6:.1f} M multiply-accumulates")
        for layer in ik.selections(model, images)[0]:
            print(f"{layer.name}: {int(layer.kept.sum())} of {layer.kept.numel()} image tokens")
        print(f"dense again, bit for bit: {torch.equal(ik.remove_idle(model)(images), logits)}")


if __name__ == "__main__":
    main()
