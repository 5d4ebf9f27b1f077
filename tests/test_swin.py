"""Swin and Swin V2 with idle tokens in their windows, against timm and against the masked form written out here."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.models.swin import Windows

pytestmark = pytest.mark.usefixtures("one_thread")

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "num_classes": 7}
# Grids of 16, 8 and 4 tokens across.
MODELS = {
    "v1": (V1, SMALL | {"window_size": 4}),
    "v1, padded": (V1, SMALL | {"window_size": 7}),
    "v1, oblong": (V1, SMALL | {"img_size": (48, 80), "window_size": (4, 5), "qkv_bias": False, "head_dim": 6}),
    "v1, any size": (V1, SMALL | {"window_size": 3, "dynamic_img_size": True, "always_partition": True}),
    "v2": (V2, SMALL | {"window_size": 4}),
    "v2, padded": (V2, SMALL | {"window_size": 5, "qkv_bias": False}),
}


def make(name: str, **kwargs) -> nn.Module:
    timm_name, own = MODELS[name]
    model = timm.create_model(timm_name, **(own | kwargs)).eval()
    with torch.no_grad():  # fresh weights are so small that every logit is nearly equal
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if p.dim() == 1 else 0.1)
    return model


def image_for(model: nn.Module, B: int = 2) -> Tensor:
    return torch.randn(B, 3, *model.patch_embed.img_size, dtype=model.norm.weight.dtype)


def logits_and_values(attn: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The biased logits [B * windows, H, M^2, M^2] and the values [B * windows, H, M^2, head_dim] of all tokens."""
    cosine = hasattr(attn, "logit_scale")
    qkv = attn.qkv(windows)
    if cosine and attn.q_bias is not None:
        qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if cosine:
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads).sigmoid()
        scale = attn.logit_scale.clamp(max=torch.tensor(100.0).log().item()).exp()
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    else:
        table = attn.relative_position_bias_table
        logits = q @ k.transpose(-2, -1) * attn.scale
    return logits + table[attn.relative_position_index].permute(2, 0, 1), v


def masked_block(x: Tensor, block: nn.Module, ratio: float) -> Tensor:
    """The paper's training form within each window, on all tokens: x [B, H, W, C]."""
    (B, H, W, C), (h, w), shift, attn = x.shape, block.window_size, block.shift_size, block.attn
    cosine = hasattr(attn, "logit_scale")
    pad = (0, 0, 0, -W % w, 0, -H % h)
    Hp, Wp = H + -H % h, W + -W % w

    def cut(t: Tensor) -> Tensor:
        return window_partition(F.pad(t.roll((-shift[0], -shift[1]), (1, 2)), pad), (h, w)).flatten(1, 2)

    def restore(t: Tensor) -> Tensor:
        return window_reverse(t.unflatten(1, (h, w)), (h, w), Hp, Wp)[:, :H, :W].roll(shift, (1, 2))

    logits, v = logits_and_values(attn, cut(x if cosine else block.norm1(x)))
    mask = block.get_attn_mask(x.new_empty((1, Hp, Wp, 1)))  # 0 or -100, [windows, M^2, M^2]
    mask = x.new_zeros((1, h * w, h * w)) if mask is None else mask
    image = window_partition(F.pad(x.new_ones((1, H, W, 1)), pad), (h, w)).flatten(1) > 0
    pairs = ((mask == 0) & image[:, :, None] & image[:, None, :]).to(x.dtype)  # query i, key j
    windows = pairs.shape[0]
    by_window = logits.unflatten(0, (B, windows))
    scores = (by_window.mean(2) * pairs).sum(2) / pairs.sum(1).clamp(min=1)
    scores = scores.masked_fill(~image, -torch.inf).flatten(0, 1)
    order = scores.argsort(dim=1, descending=True, stable=True)  # padding, all alike, in its order
    kept = torch.zeros_like(scores).scatter(1, order[:, : max(1, int(ratio * h * w))], 1.0)

    masked = (by_window + mask[:, None]).flatten(0, 1).masked_fill(kept[:, None, None] == 0, -1e5)
    branch = restore(attn.proj((masked.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    keep = restore(kept[..., None])
    x = x + keep * block.drop_path1(block.norm1(branch) if cosine else branch)
    branch = block.norm2(block.mlp(x)) if cosine else block.mlp(block.norm2(x))
    return x + keep * block.drop_path2(branch.flatten(1, 2)).view_as(x)


def masked_form(model: nn.Module, image: Tensor, schedule: list[float]) -> Tensor:
    """The logits of the dense model, run as the paper trains it."""
    x, ratios = model.patch_embed(image), iter(schedule)
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            ratio = next(ratios)
            x = block(x) if ratio == 1 else masked_block(x, block, ratio)
    return model.forward_head(model.norm(x))


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    limit = 1e-10 * max(1.0, float(wanted.detach().abs().max()))
    error = float((found - wanted).detach().abs().max())
    assert error <= limit, f"{what}: {error:.1e}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_masked_form(name: str, training: bool) -> None:
    model = make(name, drop_path_rate=0.4).double().train(training)
    image = image_for(model, B=3)
    for schedule in (ik.idle_schedule(6, 0.7), [0.7, 0.7, 0.3, 1.0, 0.5, 0.02]):
        torch.manual_seed(1)  # of stochastic depth
        wanted = masked_form(model, image, schedule)
        wanted_grads = gradients(model, wanted)
        ik.apply_idle(model, schedule=schedule)
        for backend in ("cpu", "reference"):
            with ik.use_backend(backend):
                torch.manual_seed(1)
                found = model(image)
                assert_equal(found, wanted, f"logits on {backend}")
                found_grads = gradients(model, found)
                with torch.no_grad():
                    torch.manual_seed(1)
                    assert_equal(model(image), wanted, f"logits without gradients on {backend}")
            for key, grad in wanted_grads.items():
                assert (grad is None) == (found_grads[key] is None), key
                if grad is not None:
                    assert_equal(found_grads[key], grad, f"gradient of {key}")
        ik.remove_idle(model)
