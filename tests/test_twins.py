"""Twins-PCPVT with idle query tokens, against timm and against the masked form written out here."""

from __future__ import annotations

import pytest
import timm
import torch
from comparison import assert_equal, check_masked_form, check_there_and_back
from small_models import noisy
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.models.twins import shares as shares_of

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "twins_pcpvt_small"
SMALL = {
    "img_size": 64, "depths": (2, 2, 2), "embed_dims": (16, 24, 32), "num_heads": (1, 2, 4), "mlp_ratios": (2, 2, 2),
    "sr_ratios": (8, 2, 1), "num_classes": 7,
}  # fmt: skip
# Grids of 16, 8 and 4 tokens across; "oblong": 20 x 24, which 8 does not divide, 10 x 12 and 5 x 6.
MODELS = {"square": SMALL, "oblong": SMALL | {"img_size": (80, 96)}}


def make(name: str = "square", **kwargs) -> nn.Module:
    model = timm.create_model(NAME, **(MODELS[name] | kwargs)).eval()
    return noisy(model, 0.3, 0.1)


def image_for(model: nn.Module, B: int = 2) -> Tensor:
    return torch.randn(B, 3, *model.patch_embeds[0].img_size, dtype=model.norm.weight.dtype)


def by_head(t: Tensor, heads: int) -> Tensor:  # [B, N, C] -> [B, H, N, head_dim]
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def token_shares(attn: nn.Module, normed: Tensor, size: tuple[int, int]) -> Tensor:
    """What each token adds to the mean logit of its pooled key, token by token: [B, N, C] -> [B, N]."""
    (H, W), R, C = size, attn.sr_ratio, attn.dim
    grid = normed.transpose(1, 2).unflatten(2, size)
    places = F.unfold(grid, R, stride=R).unflatten(1, (C, R * R))  # [B, C, places, cells]
    parts = torch.einsum("ocp,bcpn->bnpo", attn.sr.weight.flatten(2), places) + attn.sr.bias / R**2
    pooled = parts.sum(2, keepdim=True)
    torch.testing.assert_close(pooled.squeeze(2), attn.sr(grid).flatten(2).transpose(1, 2))
    rstd = (pooled.var(-1, correction=0, keepdim=True) + attn.norm.eps).rsqrt()
    keys = (
        (parts - parts.mean(-1, keepdim=True)) * rstd * attn.norm.weight @ attn.kv.weight[:C].T
    )  # [B, cells, places, C]
    query = by_head(attn.q(normed), attn.num_heads).mean(2)  # [B, H, head_dim]
    shares = torch.einsum("bhd,bnphd->bnp", query, keys.unflatten(3, (attn.num_heads, -1))) / attn.num_heads
    # Every pair of numbers to its place on the grid.
    shares = F.fold(shares.transpose(1, 2), (H // R * R, W // R * R), R, stride=R)
    return F.pad(shares, (0, W % R, 0, H % R)).flatten(1)


def masked_block(x: Tensor, size: tuple[int, int], block: nn.Module, ratio: float) -> Tensor:
    """All tokens are computed, and those that idle are put back: x [B, N, C]."""
    attn, normed, heads = block.attn, block.norm1(x), block.attn.num_heads
    if attn.sr is None:
        key, value = (by_head(t, heads) for t in attn.kv(normed).chunk(2, dim=2))
        logits = by_head(attn.q(normed), heads) @ key.transpose(-2, -1)
        scores = logits.mean((1, 2))
    else:
        scores = token_shares(attn, normed, size)
    order = scores.argsort(dim=1, descending=True, stable=True)  # tokens of no cell are all alike
    keep = torch.zeros_like(scores).scatter(1, order[:, : max(1, int(ratio * x.shape[1]))], 1.0)
    if attn.sr is None:
        masked = (logits * attn.scale).masked_fill(keep[:, None, None] == 0, -1e5)
        branch = attn.proj((masked.softmax(-1) @ value).transpose(1, 2).flatten(2))
    else:
        branch = attn(normed, size)
    x = x + keep[..., None] * block.drop_path1(branch)
    return x + keep[..., None] * block.drop_path2(block.mlp(block.norm2(x)))


def masked_form(model: nn.Module, image: Tensor, schedule: list[float]) -> Tensor:
    """The logits of the dense model, run as the paper trains it."""
    x, ratios = image, iter(schedule)
    for embed, stage, position in zip(model.patch_embeds, model.blocks, model.pos_block, strict=True):
        x, size = embed(x)
        for i, block in enumerate(stage):
            ratio = next(ratios)
            x = block(x, size) if ratio == 1 else masked_block(x, size, block, ratio)
            x = position(x, size) if i == 0 else x
        tokens, x = x, x.transpose(1, 2).unflatten(2, size)
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_masked_form(name: str, training: bool) -> None:
    model = make(name, drop_path_rate=0.4).double().train(training)
    image = image_for(model, B=3)
    check_masked_form(model, image, (ik.idle_schedule(6, 0.7), [0.7, 0.3, 0.5, 1.0, 0.02, 0.7]), masked_form)


@torch.no_grad()
def test_shares_add_up_to_the_logits() -> None:
    """The shares of a cell's tokens, and what all cells have alike, are the mean logit of its pooled key."""
    attn = make().double().blocks[0][0].attn
    normed, size = torch.randn(2, 16 * 24, 16, dtype=torch.float64), (16, 24)
    pooled = attn.sr(normed.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
    query, key = (by_head(t, attn.num_heads) for t in (attn.q(normed), attn.kv(attn.norm(pooled))[..., : attn.dim]))
    logits = (query @ key.transpose(-2, -1)).mean((1, 2))  # [B, cells]
    direction = attn.q(normed.mean(1)) @ attn.kv.weight[: attn.dim]
    shares = shares_of(attn, direction, normed, pooled, size) / attn.num_heads
    total = shares.unflatten(1, size).unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4)).flatten(1)
    constant = (logits - total).mean(1, keepdim=True)
    assert_equal(total + constant, logits, "mean logits")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    check_there_and_back(
        lambda: make(name),
        image_for(make(name)),
        lambda m: [b for stage in m.blocks for b in stage],
        [f"blocks.{i // 2}.{i % 2}" for i in range(6)],
    )


@torch.no_grad()
def test_idle_tokens_pass_unchanged() -> None:
    model = ik.apply_idle(make(), schedule=[0.5] * 6)
    for stage, (side, C) in enumerate(((16, 16), (8, 24), (4, 32))):
        x = torch.randn(3, side * side, C)
        before = x.clone()
        out = model.blocks[stage][1](x, (side, side))
        assert torch.equal(x, before)
        assert ((out != x).any(2).sum(1) == side * side // 2).all()


@torch.no_grad()
def test_features() -> None:
    """The whole grid of every stage, by ``forward_intermediates`` and by ``features_only``."""
    model = make()
    features = timm.create_model(NAME, **SMALL, features_only=True, out_indices=(0, 1, 2)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    image = image_for(model)
    dense = features(image)
    assert ik.apply_idle(features, keep_ratio=0.5) is features
    final, intermediates = ik.apply_idle(model, keep_ratio=0.5).forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image))
    for found, wanted, was in zip(features(image), intermediates, dense, strict=True):
        assert found.shape == was.shape and not torch.allclose(found, was)
        torch.testing.assert_close(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(ik.remove_idle(features)(image), dense, strict=True))


def test_hooks() -> None:
    model, calls = make(), []
    model.blocks[1][1].register_forward_hook(lambda *_: calls.append("block"))
    ik.apply_idle(model, keep_ratio=0.5)
    wanted = model(image_for(model))
    assert calls == ["block"] and wanted.requires_grad
    for i, name in enumerate(("norm1", "attn.q", "attn.kv", "attn.sr", "norm2", "mlp")):
        model.blocks[1][1].get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        model(image_for(model))
        assert calls[-1] == "block" and len(calls) == 1 + sum(range(2, i + 3)), name


@torch.no_grad()
def test_half_types_and_batches() -> None:
    model = ik.apply_idle(make(), keep_ratio=0.5)
    image = image_for(model, B=3)
    torch.testing.assert_close(model(image), torch.cat([model(one[None]) for one in image]), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image).isfinite().all()
    assert model.to(torch.bfloat16)(image.bfloat16()).dtype == torch.bfloat16


def test_macs() -> None:
    """Table of Twins-PCPVT-S at 224 pixels, and one block by hand."""
    model = timm.create_model(NAME)
    assert ik.count_macs(model).total / 1e9 == pytest.approx(3.809, abs=1e-3)
    report = ik.count_macs(ik.apply_idle(model, keep_ratio=0.7))
    assert report.total / 1e9 == pytest.approx(2.659, abs=1e-3)
    assert sum(report.per_layer.values()) == report.total
    C, N, cells, K = 320, 14 * 14, 7 * 7, int(0.7**2 * 196)
    pooling = N * C * C + cells * 2 * C * C  # of all tokens, then keys and values
    kept = K * (2 + 8) * C * C + 2 * K * cells * C
    score = 2 * C * C + 4 * C * C  # the direction, and at each place of a cell
    assert report.per_layer["blocks.2.3"] == pooling + kept + score


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
@torch.no_grad()
def test_compile(backend: str) -> None:
    """One graph; by default only traced, not compiled."""
    torch._dynamo.reset()
    model = ik.apply_idle(make("oblong", depths=(1, 1, 1)), schedule=[0.5, 1.0, 0.5])
    image = image_for(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("twins_svt_small", "Twins cannot idle: its attention is the locally grouped one of Twins-SVT"),
        ("pvt_v2_b0", "PyramidVisionTransformerV2 cannot idle: its MLP mixes neighbours by a depthwise convolution"),
    ],
)
def test_refusals(name: str, reason: str) -> None:
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    with pytest.raises(TypeError, match=f"^apply_idle: {reason}"):
        ik.apply_idle(model)
    assert not ik.idle_blocks(model)
    with pytest.raises(ValueError, match="^apply_idle: scorer must be 'mean' or 'auto'"):
        ik.apply_idle(make(), scorer="cls")
