"""LV-ViT against its formula, written out here on the names of the released weights (arXiv 2104.10858)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from small_models import noisy
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.models.lvvit import LVViT

pytestmark = pytest.mark.usefixtures("one_thread")

# Width, depth, heads, residual divisor and stem width of the released models.
RELEASED = {
    "lvvit_tiny_patch16_224": (240, 12, 4, 1, 64),
    "lvvit_small_patch16_224": (384, 16, 6, 2, 64),
    "lvvit_medium_patch16_224": (512, 20, 8, 2, 64),
    "lvvit_large_patch16_224": (768, 24, 12, 3, 128),
}
TINY = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}


def released_shapes(name: str) -> dict[str, list[int]]:
    """Every key of the released state dict, with its shape."""
    width, depth, _, _, stem = RELEASED[name]
    shapes = {"cls_token": [1, 1, width], "pos_embed": [1, 197, width]}
    for i, channels in enumerate((3, stem, stem), 1):
        kernel = 7 if i == 1 else 3
        shapes[f"patch_embed.conv{i}.weight"] = [stem, channels, kernel, kernel]
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{i}.{key}"] = [stem]
        shapes[f"patch_embed.bn{i}.num_batches_tracked"] = []
    shapes |= {"patch_embed.proj.weight": [width, stem, 8, 8], "patch_embed.proj.bias": [width]}
    for i in range(depth):
        block = {
            "norm1": [width],
            "attn.proj": [width, width],
            "norm2": [width],
            "mlp.fc1": [3 * width, width],
            "mlp.fc2": [width, 3 * width],
        }
        shapes[f"blocks.{i}.attn.qkv.weight"] = [3 * width, width]
        for key, shape in block.items():
            shapes |= {f"blocks.{i}.{key}.weight": shape, f"blocks.{i}.{key}.bias": shape[:1]}
    shapes |= {"norm.weight": [width], "norm.bias": [width]}
    for key in ("head", "aux_head"):
        shapes |= {f"{key}.weight": [1000, width], f"{key}.bias": [1000]}
    return shapes


def formula(w: dict[str, Tensor], image: Tensor, depth: int, heads: int, skip_lam: float) -> Tensor:
    def linear(key: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{key}.weight"], w.get(f"{key}.bias"))

    def norm(key: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], 1e-5)

    x = image
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
        x = F.conv2d(x, w[f"patch_embed.conv{i}.weight"], None, stride, padding)
        stats = (w[f"patch_embed.bn{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *stats).relu()
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 8)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", attention.transpose(1, 2).flatten(2)) / skip_lam
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden) / skip_lam
    x = norm("norm", x)
    return linear("head", x[:, 0]) + 0.5 * linear("aux_head", x[:, 1:]).max(1).values


def noisy_with_statistics(model: nn.Module) -> nn.Module:
    """Weights and statistics of some size, so that no term can be left out unseen."""
    with torch.no_grad():
        for key, b in noisy(model, 0.1, 0.03).named_buffers():
            if "running" in key:
                b.add_(torch.rand_like(b))
    return model.eval()


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_equals_the_formula(name: str) -> None:
    _, _, heads, skip_lam, _ = RELEASED[name]
    model = noisy_with_statistics(timm.create_model(name, depth=3, img_size=64, num_classes=11))
    image = torch.randn(2, 3, 64, 64)
    wanted = formula({k: v.double() for k, v in model.state_dict().items()}, image.double(), 3, heads, skip_lam)
    torch.testing.assert_close(model(image).double(), wanted, rtol=1e-5, atol=1e-5)
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(model(image).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_keys_of_the_released_weights(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = released_shapes(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == wanted
    assert {key: list(value.shape) for key, value in ik.apply_idle(model).state_dict().items()} == wanted


@pytest.mark.parametrize(
    "name, dense, idle", [("lvvit_small_patch16_224", 6.551, 4.600), ("lvvit_medium_patch16_224", 12.678, 8.484)]
)
def test_gmacs(name: str, dense: float, idle: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert ik.count_macs(model).total / 1e9 == pytest.approx(dense, abs=5e-4)
    assert ik.count_macs(ik.apply_idle(model, keep_ratio=0.7)).total / 1e9 == pytest.approx(idle, abs=5e-4)


def test_schedule_of_the_paper() -> None:
    with torch.device("meta"):
        small, medium = (timm.create_model(f"lvvit_{size}_patch16_224") for size in ("small", "medium"))
    assert list(ik.idle_blocks(ik.apply_idle(small))) == [f"blocks.{i}" for i in range(4, 16)]
    assert list(ik.idle_blocks(ik.apply_idle(medium))) == [f"blocks.{i}" for i in range(5, 20)]


@torch.no_grad()
def test_full_grid_at_any_size() -> None:
    model = noisy_with_statistics(timm.create_model("lvvit_small_patch16_224", **TINY, dynamic_img_size=True))
    ik.apply_idle(model, keep_ratio=0.5)
    for H, W in ((64, 64), (96, 48)):
        image = torch.randn(2, 3, H, W)
        final, maps = model.forward_intermediates(image)
        x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
        for block, found in zip(model.blocks, maps, strict=True):
            x = block(x)
            torch.testing.assert_close(found, x[:, 1:].transpose(1, 2).unflatten(2, (H // 16, W // 16)))
        torch.testing.assert_close(final, model.norm(x))
        torch.testing.assert_close(model(image), model.forward_head(final))
    padded = noisy_with_statistics(
        timm.create_model("lvvit_small_patch16_224", **TINY, dynamic_img_size=True, dynamic_img_pad=True)
    )
    assert padded(torch.randn(1, 3, 70, 90)).shape == (1, 7)


@torch.no_grad()
def test_features_only() -> None:
    model = timm.create_model("lvvit_small_patch16_224", **(TINY | {"num_classes": 0}), features_only=True).eval()
    ik.apply_idle(model, keep_ratio=0.5)
    assert [f.shape for f in model(torch.randn(2, 3, 64, 64))] == [(2, 48, 4, 4)] * 3


def test_training_returns_the_same_logits() -> None:
    model = ik.apply_idle(noisy_with_statistics(timm.create_model("lvvit_small_patch16_224", **TINY)), keep_ratio=0.5)
    image = torch.randn(2, 3, 64, 64)
    model.train()
    model.patch_embed.eval()  # batch statistics
    with torch.no_grad():
        wanted = model(image)
    found = model(image)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_for_distillation_are_all_tokens_and_the_loss_takes_those_last_kept() -> None:
    image, targets = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    teacher = ik.IdleViTForTraining(noisy_with_statistics(timm.create_model("lvvit_small_patch16_224", **TINY)))
    student = noisy_with_statistics(timm.create_model("lvvit_small_patch16_224", **TINY))
    out = ik.IdleViTForTraining(ik.apply_idle(student, keep_ratio=0.5))(image)
    with torch.no_grad():
        wanted = teacher(image)
        kept = [F.normalize(ik.gather_tokens(f, out.indices[-1]), dim=-1) for f in (out.features, wanted.features)]
    assert out.features.shape == (2, 17, 48) and out.indices[-1].shape == (2, 3)
    torch.testing.assert_close(out.logits, student(image))
    _, parts = ik.IdleViTLoss(nn.CrossEntropyLoss())(out, targets, wanted)
    torch.testing.assert_close(parts["features"], F.mse_loss(*kept))


@torch.no_grad()
def test_classifier() -> None:
    model = timm.create_model("lvvit_small_patch16_224", **TINY)
    image = torch.randn(2, 3, 64, 64)
    model.reset_classifier(5)
    assert model(image).shape == (2, 5) and model.aux_head.weight.shape == (5, 48)
    model.reset_classifier(0)
    assert model(image).shape == (2, 48)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, 17, 48)
    assert timm.create_model("lvvit_tiny_patch16_224", in_chans=1, **TINY)(image[:, :1]).shape == (2, 7)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="^LVViT: global_pool must be 'token'"):
        LVViT(global_pool="avg")
    model = timm.create_model("lvvit_small_patch16_224", **TINY)
    with pytest.raises(ValueError, match="^LVViT: global_pool must be 'token'"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match=r"^LVViT: x must be \(64, 64\) pixels.*got \(64, 96\)"):
        model(torch.randn(1, 3, 64, 96))
    dynamic = timm.create_model("lvvit_small_patch16_224", **TINY, dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"^LVViT: x must be.*patch size \(16, 16\) divides, got \(64, 72\)"):
        dynamic(torch.randn(1, 3, 64, 72))
    with pytest.raises(ValueError, match="^set_input_size: patch_size must be"):
        model.set_input_size(patch_size=8)
    model.set_input_size(img_size=(96, 96), patch_size=16)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 7)


def test_the_file_registers_and_the_package_alone_does_not() -> None:
    script = (
        "import sys, idlevit_kernels, idlevit_kernels.models\n"
        "assert 'timm' not in sys.modules\n"
        "import timm\n"
        "assert not timm.is_model('lvvit_small_patch16_224')\n"
        "import idlevit_kernels.models.lvvit\n"
        "print(*timm.list_models('lvvit*'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == sorted(RELEASED)
