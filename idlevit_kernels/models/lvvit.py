"""LV-ViT (Jiang et al., "All Tokens Matter", arXiv 2104.10858), which timm does not have: importing this registers it.

    import timm
    import idlevit_kernels.models.lvvit

    model = timm.create_model("lvvit_small_patch16_224")

It is timm's VisionTransformer but for a convolutional stem, residual branches divided by a constant, and a second head
on the image tokens; so ``apply_idle``, ``features_only`` and the rest work as they do there. State-dict keys are those
of the LV-ViT and IdleViT checkpoints that their authors released (``load_released``). ``import idlevit_kernels`` alone
does not import this file: it imports timm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm, PatchEmbed, trunc_normal_
from timm.layers.format import nchw_to
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import value_error


class Stem(PatchEmbed):
    """Three convolutions at half the image's resolution, then one of patch_size / 2 to the tokens.

    Args:
        stem_channels: of the three convolutions.
        others: as in timm's PatchEmbed; patch_size must be even.
    """

    def __init__(
        self, stem_channels: int = 64, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **kwargs: Any
    ):
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        dd = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        half = patch_size // 2
        del self.proj  # to come last
        self.conv1 = nn.Conv2d(in_chans, stem_channels, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_channels, **dd)
        self.conv2 = nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(stem_channels, **dd)
        self.conv3 = nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(stem_channels, **dd)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(stem_channels, embed_dim, half, stride=half, **dd)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            expected = f"{self.patch_size}: the kernels of LV-ViT's stem cannot be resized"
            raise value_error("set_input_size", "patch_size", expected, patch_size)
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> tokens [B, N, C], or [B, H / p, W / p, C] where the model's size is dynamic."""
        (H, W), (p, q) = x.shape[2:], self.patch_size
        if self.strict_img_size and (H, W) != self.img_size:
            expected = f"{tuple(self.img_size)} pixels, the model's size (or use dynamic_img_size=True)"
            raise value_error("LVViT", "x", expected, (H, W))
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -W % q, 0, -H % p))
        elif H % p or W % q:
            raise value_error("LVViT", "x", f"of a height and width that the patch size {(p, q)} divides", (H, W))
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt))


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class ScaledBlock(Block):
    """timm's block with both residual branches divided by ``skip_lam``; it stands where LayerScale does."""

    def __init__(self, *args: Any, skip_lam: float = 2.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if skip_lam != 1:
            self.add_module("ls1", Scale(1 / skip_lam))
            self.add_module("ls2", Scale(1 / skip_lam))


class LVViT(VisionTransformer):
    """LV-ViT: logits = head(class token) + 0.5 * the largest of aux_head(image tokens), for each class.

    The auxiliary head is what token labelling trains. Its mixing of two images' tokens in training is left out: in
    training, too, the model returns these logits, as IdleViT's finetuning (arXiv 2310.05654) uses them.

    Args:
        skip_lam: residual branches are divided by this.
        stem_channels: width of the convolutional stem.
        num_classes, global_pool: 'token'; with 0 classes the model returns the class token, or with '' all tokens.
        others: as in timm's VisionTransformer; mlp_ratio is 3, queries, keys and values have no bias, the norms' eps is
            1e-5.
    """

    def __init__(
        self,
        skip_lam: float = 2.0,
        stem_channels: int = 64,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        **kwargs: Any,
    ):
        _check_pool(num_classes, global_pool)
        arguments: dict[str, Any] = {
            "embed_layer": partial(Stem, stem_channels=stem_channels),
            "block_fn": partial(ScaledBlock, skip_lam=skip_lam),
            "norm_layer": partial(LayerNorm, eps=1e-5),
            "num_classes": num_classes,
            "global_pool": global_pool,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
        }
        super().__init__(**(arguments | kwargs))
        self.aux_head = self._make_aux_head(num_classes)

    def _make_aux_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        like: Any = self.cls_token
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        _check_pool(num_classes, self.global_pool if global_pool is None else global_pool)
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._make_aux_head(num_classes).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens [B, T, C] -> logits [B, num_classes]; the class token [B, C] if ``pre_logits``."""
        cls = super().forward_head(x, pre_logits=True)
        if pre_logits or not self.num_classes:
            return cls
        return self.head(cls) + 0.5 * self.aux_head(x[:, self.num_prefix_tokens :]).max(1).values


def _check_pool(num_classes: int, global_pool: str) -> None:
    if global_pool != "token" and (num_classes or global_pool):
        expected = "'token' where there are classes: the logits come from the class token and the image tokens"
        raise value_error("LVViT", "global_pool", expected, global_pool)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "paper_ids": "arXiv:2104.10858",
    } | kwargs


default_cfgs = generate_default_cfgs(
    {
        "lvvit_tiny_patch16_224": _cfg(),
        "lvvit_small_patch16_224": _cfg(),
        "lvvit_medium_patch16_224": _cfg(crop_pct=1.0),
        "lvvit_large_patch16_224": _cfg(crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **arguments: Any) -> LVViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(arguments | kwargs),
    )


@register_model
def lvvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 12 layers of width 240; its residual branches are not scaled."""
    return _create("lvvit_tiny_patch16_224", pretrained, kwargs, embed_dim=240, depth=12, num_heads=4, skip_lam=1.0)


@register_model
def lvvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 16 layers of width 384."""
    return _create("lvvit_small_patch16_224", pretrained, kwargs, embed_dim=384, depth=16, num_heads=6)


@register_model
def lvvit_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 20 layers of width 512."""
    return _create("lvvit_medium_patch16_224", pretrained, kwargs, embed_dim=512, depth=20, num_heads=8)


@register_model
def lvvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: 24 layers of width 768, a stem of 128 channels, residual branches divided by 3."""
    arguments = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_channels": 128}
    return _create("lvvit_large_patch16_224", pretrained, kwargs, **arguments)
