"""Rotary and gated Vision Transformers: timm's Eva (EVA-02, DINOv3, ...) dense, idle and in the paper's masked form."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import timm
import torch
from comparison import assert_equal, assert_equal_gradients, check_masked_form, gradients, noisy
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor, nn

import idlevit_kernels as ik

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"img_size": 64, "patch_size": 16, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
MODELS = {
    "EVA-02": ("eva02_tiny_patch14_224", {}),  # rotary, SwiGLU
    "EVA-02, norms within": ("eva02_base_patch14_448", {}),  # queries, keys and values apart
    "EVA": ("eva_giant_patch14_224", {}),  # no rotary embedding, but a bias of queries apart
    "DINOv3": ("vit_small_patch16_dinov3", {}),  # registers, halves rotated, LayerScale
    "DINOv3 plus": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "no class token": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "a rotation for each layer and head": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "axial": ("vit_small_patch16_rope_224", {}),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "shared keys": ("vit_base_patch16_sapiens2", {"num_heads": 6, "embed_dim": 96, "num_kv_heads": (6, 2, 2, 3)}),
    "shared keys, not rotated": (
        "eva02_tiny_patch14_224",
        {"use_rot_pos_emb": False, "attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False},
    ),
    "mean": ("vit_small_patch16_rope_224", {"class_token": False, "global_pool": "avg"}),
}
each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, **changes) -> nn.Module:
    timm_name, kwargs = MODELS[name]
    if "num_kv_heads" in kwargs and "num_kv_heads" not in inspect.signature(Eva).parameters:
        pytest.skip("this timm has no heads that share keys")
    model = timm.create_model(timm_name, **(SMALL | kwargs | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2 if p.dim() == 1 else 0.05)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    if model.rope_mixed and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip("this timm multiplies float64 positions with float32 frequencies: the dense model fails, too")
    return model.double()


def ropes(model: nn.Module, rope: Tensor | None) -> list[Tensor | None]:
    return list(rope) if model.rope_mixed and rope is not None else [rope] * len(model.blocks)


def masked_block(
    x: Tensor, block: nn.Module, rope: Tensor | None, num_keep: int, P: int, scorer: str
) -> tuple[Tensor, Tensor]:
    """The block's output and its token cut loss."""
    attn, normed = block.attn, block.norm1(x)
    if attn.qkv is None:
        q, k, v = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)
    else:
        q, k, v = attn.qkv(normed).chunk(3, -1)
        if getattr(attn, "q_bias", None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (t.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for t in (q, k, v))  # [B, H, T, head_dim]
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (
            torch.cat([t[:, :, :P], apply_rot_embed_cat(t[:, :, P:], rope, half=attn.rotate_half)], 2) for t in (q, k)
        )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.mT
    scores = logits.mean(1)[:, 0] if scorer == "cls" else logits.mean((1, 2))
    kept = scores[:, P:].topk(num_keep).indices + P
    mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
    mask[:, :P] = 1.0
    masked = (logits * attn.scale).masked_fill(mask[:, None, None, :] == 0, -1e5)
    branch = attn.norm((masked.softmax(-1) @ v).transpose(1, 2).flatten(2))
    branch = attn.proj(branch if getattr(attn, "gate", None) is None else branch * attn.gate(normed).sigmoid())
    gamma_1, gamma_2 = (1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
    x = x + mask[..., None] * block.drop_path1(gamma_1 * branch)
    out = x + mask[..., None] * block.drop_path2(gamma_2 * block.mlp(block.norm2(x)))
    weights = (attn.scale * logits.mean(1)).softmax(-1)  # [B, T, T]
    to_kept, to_prefix = (weights * mask[:, None]).sum(2), weights[..., :P].sum(2)
    intra = mask * (1 - to_kept)
    return out, ((intra + (1 - mask) * (to_kept - to_prefix)).square() + intra.square()).mean()


def masked_form(model: nn.Module, image: Tensor, schedule: list[float]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the token cut loss of each idle layer."""
    x, rope = model._pos_embed(model.patch_embed(image))
    x, P = model.norm_pre(x), model.num_prefix_tokens
    scorer, cuts = "mean" if model.cls_token is None else "cls", []
    for block, ratio, own in zip(model.blocks, schedule, ropes(model, rope), strict=True):
        if ratio == 1:
            x = block(x, rope=own)
        else:
            x, cut = masked_block(x, block, own, max(1, int(ratio * (x.shape[1] - P))), P, scorer)
            cuts.append(cut)
    return model.forward_head(model.norm(x)), cuts


@pytest.mark.parametrize("ratio", [0.7, 0.3])
@each_model
def test_equals_the_masked_form(name: str, ratio: float) -> None:
    model = in_float64(make(name, drop_path_rate=0.3))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        check_masked_form(
            model.train(training), image, [ik.idle_schedule(4, ratio)], lambda *args: masked_form(*args)[0]
        )


@each_model
def test_training_form(name: str) -> None:
    """Logits, token cut losses and the gradient of both."""
    model = in_float64(make(name))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    logits, cuts = masked_form(model, image, ik.idle_schedule(4, 0.5))
    wanted = torch.cat([logits.flatten(), torch.stack(cuts)])
    wanted_grads = gradients(model, wanted)
    wrapped = ik.IdleViTForTraining(ik.apply_idle(model, keep_ratio=0.5))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        out = wrapped(image)
        assert_equal(torch.cat([out.logits.flatten(), out.token_cut]), wanted, "logits and cuts")
        found = gradients(model, torch.cat([out.logits.flatten(), out.token_cut]))
        assert_equal_gradients(found, wanted_grads)
    assert out.features.shape == (2, model.num_features)


@each_model
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    model = make(name)
    image = torch.randn(2, 3, 64, 64)
    dense, blocks = model(image), list(model.blocks)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(model(image), dense, rtol=1e-5, atol=1e-5)
    ik.apply_idle(ik.remove_idle(model), keep_ratio=0.5)
    assert list(ik.idle_blocks(model)) == ["blocks.1", "blocks.2", "blocks.3"]
    assert {b.scorer for b in ik.idle_blocks(model).values()} == {"mean" if model.cls_token is None else "cls"}
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    idle = model(image)
    assert idle.isfinite().all() and not torch.allclose(idle, dense)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(image), idle)
    ik.remove_idle(model)
    assert type(model.blocks) is nn.ModuleList and all(a is b for a, b in zip(model.blocks, blocks, strict=True))
    assert torch.equal(model(image), dense)


@pytest.mark.parametrize("name", ["EVA-02", "DINOv3", "a rotation for each layer and head", "no class token"])
@torch.no_grad()
def test_full_grid_at_any_size(name: str) -> None:
    model = ik.apply_idle(make(name, dynamic_img_size=True), keep_ratio=0.5)
    P = model.num_prefix_tokens
    for H, W in ((64, 64), (96, 48)):
        image = torch.randn(2, 3, H, W)
        final, maps = model.forward_intermediates(image)
        x, rope = model._pos_embed(model.patch_embed(image))
        x = model.norm_pre(x)
        for i, (block, own) in enumerate(zip(model.blocks, ropes(model, rope), strict=True)):
            before, x = x, block(x, rope=own)
            torch.testing.assert_close(maps[i], x[:, P:].transpose(1, 2).unflatten(2, (H // 16, W // 16)))
            changed = (before != x).any(-1)
            assert changed[:, :P].all()
            assert (changed[:, P:].sum(1) == max(1, int(block.keep_ratio * (x.shape[1] - P)))).all()
        torch.testing.assert_close(final, model.norm(x))
        torch.testing.assert_close(model(image), model.forward_head(final))


@torch.no_grad()
def test_features_only() -> None:
    model = timm.create_model("vit_small_patch16_dinov3", **SMALL | {"num_classes": 0}, features_only=True).eval()
    keys = list(model.state_dict())
    ik.apply_idle(model, keep_ratio=0.5)
    assert list(model.state_dict()) == keys and len(ik.idle_blocks(model)) >= 2
    assert all(f.shape == (2, 48, 4, 4) for f in model(torch.randn(2, 3, 64, 64)))


def test_patch_dropout_and_checkpointing() -> None:
    """In training each image then has an embedding of its own."""
    for name in ("EVA-02", "a rotation for each layer and head"):
        model = ik.apply_idle(make(name, patch_drop_rate=0.5), keep_ratio=0.5).train()
        image = torch.randn(2, 3, 64, 64)

        def step(model: nn.Module = model, image: Tensor = image) -> list[Tensor]:
            torch.manual_seed(1)
            model.zero_grad()
            model(image).square().sum().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        wanted = step()
        model.set_grad_checkpointing()
        for found, grad in zip(step(), wanted, strict=True):
            torch.testing.assert_close(found, grad)


def test_half_precision_and_moving() -> None:
    model = ik.apply_idle(make("DINOv3"), keep_ratio=0.5).to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).isfinite().all()
    ik.remove_idle(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_macs_agree_with_a_real_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("EVA-02", "DINOv3 plus", "a rotation for each layer and head"):
        model = ik.apply_idle(make(name), keep_ratio=0.5)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 64, 64))
        assert ik.count_macs(model, (3, 64, 64)).total == pytest.approx(counter.get_total_flops() / 2, rel=1e-2)


def test_post_norm_is_refused() -> None:
    model = make("EVA-02", use_post_norm=True, init_values=None)
    with pytest.raises(TypeError, match=r"^apply_idle: Eva cannot idle.*EvaBlockPostNorm.*post-norm"):
        ik.apply_idle(model)


def test_bad_rope() -> None:
    model = make("EVA-02")
    x, rope = model._pos_embed(model.patch_embed(torch.randn(2, 3, 64, 64)))
    block = model.blocks[1]
    assert ik.idle_block(x, block, 4, context=ik.Context(rope)).shape == x.shape
    with pytest.raises(
        ValueError, match=r"^idle_block: context.rope must be \[..., N, D\] with the N = 16 image tokens, got"
    ):
        ik.idle_block(x, block, 4, context=ik.Context(rope[1:]))
    with pytest.raises(
        ValueError, match="^idle_block: num_prefix_tokens must be 1, as many as the block's attention does"
    ):
        ik.idle_block(x, block, 4, num_prefix_tokens=2, context=ik.Context(rope))
    with pytest.raises(TypeError, match="^idle_block: context.rope must be"):
        ik.idle_block(x, block, 4, context=ik.Context("cat"))
    with pytest.raises(TypeError, match="^idle_block: rope= was replaced in version 0.2.0: use context=Context"):
        ik.idle_block(x, block, 4, rope=rope)
    plain = noisy(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48)).blocks[0]
    with pytest.raises(ValueError, match="^idle_block: context must be without a rotary embedding"):
        ik.idle_block(x, plain, 4, context=ik.Context(rope))
