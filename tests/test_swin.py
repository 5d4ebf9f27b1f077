"""Swin and Swin V2 with idle tokens in their windows, against timm and against the masked form written out here."""

from __future__ import annotations

import pytest
import timm
import torch
from comparison import assert_equal, check_masked_form, check_there_and_back, gradients
from small_models import noisy
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
    "v1, any size": (V1, SMALL | {"window_size": 3, "strict_img_size": False, "always_partition": True}),
    "v2": (V2, SMALL | {"window_size": 4}),
    "v2, padded": (V2, SMALL | {"window_size": 5, "qkv_bias": False, "strict_img_size": False}),
}


def make(name: str, **kwargs) -> nn.Module:
    timm_name, own = MODELS[name]
    model = timm.create_model(timm_name, **(own | kwargs)).eval()
    return noisy(model, 0.3, 0.1)


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
    (B, H, W, _), (h, w), shift, attn = x.shape, block.window_size, block.shift_size, block.attn
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


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_masked_form(name: str, training: bool) -> None:
    model = make(name, drop_path_rate=0.4).double().train(training)
    image = image_for(model, B=3)
    check_masked_form(model, image, (ik.idle_schedule(6, 0.7), [0.7, 0.7, 0.3, 1.0, 0.5, 0.02]), masked_form)


def test_this_comparison_can_fail() -> None:
    """The bias is part of the score: without it other tokens would be kept."""
    model = make("v1").double()
    image, schedule = image_for(model), [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    wanted = masked_form(model, image, schedule)
    attn = model.layers[1].blocks[1].attn
    attn.relative_position_bias_table.data.zero_()
    with pytest.raises(AssertionError, match="^logits"):
        assert_equal(ik.apply_idle(model, schedule=schedule)(image), wanted, "logits")


# timm and back


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    check_there_and_back(
        lambda: make(name),
        image_for(make(name)),
        lambda m: [b for stage in m.layers for b in stage.blocks],
        [f"layers.{i // 2}.blocks.{i % 2}" for i in range(6)],
    )


@pytest.mark.parametrize("name", ["v1", "v1, padded", "v2"])
@torch.no_grad()
def test_idle_tokens_pass_unchanged(name: str) -> None:
    model = ik.apply_idle(make(name), schedule=[1.0, 1.0, 0.5, 0.5, 1.0, 1.0])
    for i, block in enumerate(model.layers[1].blocks):
        dense = block.dense_block()
        windows = Windows((8, 8), dense.window_size, dense.shift_size, torch.device("cpu"))
        assert windows.shifted == (i == 1 and dense.window_size[0] < 8)
        x = torch.randn(3, 8, 8, 32)
        before = x.clone()
        out = block(x)
        assert torch.equal(x, before)
        computed = (out != x).any(-1, keepdim=True)
        kept = windows.split(computed.float()).sum((1, 2))
        real = windows.split(torch.ones(3, 8, 8, 1)).sum((1, 2))
        assert torch.equal(kept, real.clamp(max=dense.window_area // 2))  # padding comes last


def test_windows_are_those_of_timm() -> None:
    block = timm.create_model(V1, **SMALL, window_size=3).layers[0].blocks[1]
    for grid in ((16, 16), (15, 9), (4, 20)):
        x = torch.randn(2, *grid, 5)
        windows = Windows(grid, (3, 3), (1, 1), x.device)
        assert torch.equal(windows.join(windows.split(x)), x)
        shifted = F.pad(x.roll((-1, -1), (1, 2)), (0, 0, 0, -grid[1] % 3, 0, -grid[0] % 3))
        assert torch.equal(windows.split(x), window_partition(shifted, (3, 3)).flatten(1, 2))
        seen = block.get_attn_mask(shifted) == 0
        assert torch.equal(windows.regions[:, :, None] == windows.regions[:, None, :], seen)


@torch.no_grad()
def test_small_windows_cap_the_number_of_kept_tokens() -> None:
    """timm cuts the window down to the grid, and at least one token is computed in each."""
    model = ik.apply_idle(make("v1", img_size=16), schedule=[1.0, 1.0, 0.9, 0.9, 0.3, 0.3])
    sizes = [block.dense_block().window_size for block in ik.idle_blocks(model).values()]
    assert sizes == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


# How timm uses its blocks


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_set_input_size(name: str) -> None:
    """Before or after ``apply_idle``, and the dense model that comes back has the new size as well."""
    first, second = make(name), make(name)
    second.load_state_dict(first.state_dict())
    first.set_input_size(img_size=(96, 64), window_size=(3, 4))
    ik.apply_idle(first, keep_ratio=0.5)
    ik.apply_idle(second, keep_ratio=0.5).set_input_size(img_size=(96, 64), window_size=(3, 4))
    image = torch.randn(2, 3, 96, 64)
    assert torch.equal(first(image), second(image))
    assert torch.equal(ik.remove_idle(first)(image), ik.remove_idle(second)(image))


@pytest.mark.parametrize("timm_name", [V1, V2])
@torch.no_grad()
def test_any_image_size(timm_name: str) -> None:
    model = timm.create_model(timm_name, **SMALL, window_size=5, strict_img_size=False).double().eval()
    schedule = [0.5, 0.7, 0.5, 1.0, 0.3, 0.5]
    for size in ((64, 64), (68, 100), (20, 24)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        wanted = masked_form(model, image, schedule)
        assert_equal(ik.apply_idle(model, schedule=schedule)(image), wanted, f"logits at {size}")
        ik.remove_idle(model)


@pytest.mark.parametrize("timm_name", [V1, V2])
@torch.no_grad()
def test_features(timm_name: str) -> None:
    """The whole grid of every stage, by ``forward_intermediates`` and by ``features_only``."""
    model = timm.create_model(timm_name, **SMALL, window_size=4).eval()
    features = timm.create_model(timm_name, **SMALL, window_size=4, features_only=True).eval()
    keys = list(features.state_dict())
    state = {key.replace("layers.", "layers_"): value for key, value in model.state_dict().items()}
    features.load_state_dict({key: state[key] for key in keys})
    image = torch.randn(2, 3, 64, 64)
    dense = features(image)
    ik.apply_idle(model, keep_ratio=0.5)
    assert ik.apply_idle(features, keep_ratio=0.5) is features and list(features.state_dict()) == keys
    assert len(ik.idle_blocks(features)) == len(ik.idle_blocks(model)) == 5
    found, x = features(image), model.patch_embed(image)
    _, intermediates = model.forward_intermediates(image)
    for got, nchw, was, stage in zip(found, intermediates, dense, model.layers, strict=True):
        x = stage(x)
        assert got.shape == was.shape
        torch.testing.assert_close(got, x)
        torch.testing.assert_close(nchw, x.permute(0, 3, 1, 2))
    assert ik.count_macs(features).total < ik.count_macs(ik.remove_idle(features)).total
    assert all(torch.equal(a, b) for a, b in zip(features(image), dense, strict=True))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_gradient_checkpointing_and_hooks(name: str) -> None:
    model, calls = make(name, drop_path_rate=0.0).train(), []
    handle = model.layers[1].blocks[1].register_forward_hook(lambda *_: calls.append("hook"))
    ik.apply_idle(model, keep_ratio=0.5)
    image = image_for(model)
    wanted = gradients(model, model(image))
    assert calls == ["hook"]
    handle.remove()
    model.layers[1].blocks[1].norm1.register_forward_hook(lambda *_: calls.append("norm"))
    model.set_grad_checkpointing(True)
    for key, grad in gradients(model, model(image)).items():
        torch.testing.assert_close(grad, wanted[key])
    assert calls == ["hook", "norm", "norm"]


@pytest.mark.parametrize("name", ["v1", "v1, padded", "v2"])
def test_projections_that_are_no_plain_linear(name: str) -> None:
    """A hooked projection is called as in timm, whose V2 reads its weight instead, and the logits stay."""
    model, calls = ik.apply_idle(make(name), keep_ratio=0.5), []
    image = image_for(model)
    wanted = model(image)
    for block in ik.idle_blocks(model).values():
        block.attn.qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == (0 if name == "v2" else 5)


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_half_types(name: str) -> None:
    model = ik.apply_idle(make(name), keep_ratio=0.5)
    image = image_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image).isfinite().all()
    assert model.to(torch.bfloat16)(image.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_batch_of_none_and_images_apart() -> None:
    model = ik.apply_idle(make("v1"), keep_ratio=0.5)
    assert model(torch.randn(0, 3, 64, 64)).shape == (0, 7)
    image = image_for(model, B=3)
    torch.testing.assert_close(model(image), torch.cat([model(one[None]) for one in image]), rtol=1e-4, atol=1e-4)


# Counting, compiling, refusing


def test_macs() -> None:
    """Table of Swin-T at 224 pixels, and one block by hand."""
    model = timm.create_model(V1)
    assert ik.count_macs(model).total / 1e9 == pytest.approx(4.491, abs=1e-3)
    report = ik.count_macs(ik.apply_idle(model, keep_ratio=0.7))
    assert report.total / 1e9 == pytest.approx(2.924, abs=1e-3)
    assert sum(report.per_layer.values()) == report.total
    C, M2, windows, K = 384, 49, 4, int(0.7**2 * 49)
    kept = windows * K * 12 * C * C + windows * 2 * K * K * C
    score = windows * 2 * C * C + windows * M2 * C  # a direction and a dot product with it
    assert report.per_layer["layers.2.blocks.2"] == kept + score


@pytest.mark.parametrize("name", ["v1", "v1, padded", "v2"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
@torch.no_grad()
def test_compile(name: str, backend: str) -> None:
    """One graph; by default only traced, not compiled."""
    torch._dynamo.reset()
    model = ik.apply_idle(make(name, depths=(1, 2), num_heads=(2, 2)), schedule=[1.0, 0.5, 0.5])
    image = image_for(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    model = make("v1")
    with pytest.raises(ValueError, match="^apply_idle: scorer must be 'mean' or 'auto'"):
        ik.apply_idle(model, scorer="cls")
    with pytest.raises(ValueError, match="^apply_idle: schedule must be one keep ratio for each of the 6 layers"):
        ik.apply_idle(model, schedule=[0.5] * 3)

    class Other(type(model.layers[0].blocks[0].attn)):
        pass

    model.layers[0].blocks[1].attn.__class__ = Other
    with pytest.raises(TypeError, match="^apply_idle: SwinTransformer cannot idle: its attention is Other"):
        ik.apply_idle(model)
    assert not ik.idle_blocks(model)
    unknown = timm.create_model("swinv2_cr_tiny_224", depths=(1, 1, 1, 1))
    with pytest.raises(TypeError, match="^apply_idle: model must be one of: .*SwinTransformerV2, .*; got timm"):
        ik.apply_idle(unknown)
