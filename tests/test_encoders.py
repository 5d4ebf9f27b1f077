"""Models that hold an encoder, or several, any depth down."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from families import MAKE
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.measure.tune import Target, tune_schedule

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}


class Two(nn.Module):
    """Two encoders of different depth, width and kind of class token, whose features are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first = timm.create_model("vit_tiny_patch16_224", **SIZE, depth=4, num_classes=0)
        gap = {"class_token": False, "global_pool": "avg", "num_classes": 0}
        self.second = timm.create_model("vit_tiny_patch16_224", **SIZE, **gap, depth=8)
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(images), self.second(images)], 1))


class Deep(nn.Module):
    """Somebody's own module around a model of transformers around one of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"tower": wrapper(), "head": nn.Linear(32, 5)})

    def forward(self, images: Tensor) -> Tensor:
        return self.parts["head"](self.parts["tower"](images).last_hidden_state[:, 0])


class Adapted(nn.Module):
    """As PEFT wraps a model: `base_model.model`, and calls are handed on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


def wrapper() -> nn.Module:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments)
    return transformers.TimmWrapperModel(config)


def hf(kind: str = "ViT") -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


WITHIN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Sequential": (
        lambda: nn.Sequential(timm.create_model("vit_tiny_patch16_224", **SIZE, depth=4, num_classes=0), nn.ReLU()),
        "0.blocks.",
    ),
    "TimmWrapper": (wrapper, "timm_model.blocks."),
    "one's own": (Deep, "parts.tower.timm_model.blocks."),
    "adapted": (
        lambda: Adapted(timm.create_model("vit_tiny_patch16_224", **SIZE, depth=4)),
        "base_model.model.blocks.",
    ),
    "features within": (
        lambda: nn.Sequential(timm.create_model("vit_tiny_patch16_224", **SIZE, depth=4, features_only=True)),
        "0.model.blocks.",
    ),
    "transformers within": (lambda: Adapted(hf("Dinov2")), "base_model.model."),
    "Swin's features within": (
        lambda: Adapted(
            timm.create_model(
                "swin_tiny_patch4_window7_224", img_size=32, depths=(2, 2), embed_dim=16, num_heads=(2, 4),
                window_size=4, features_only=True, out_indices=(0, 1),
            )
        ),
        "base_model.model.layers_",
    ),
}  # fmt: skip


def flat(out: Any) -> Tensor:
    if isinstance(out, (list, tuple)):
        return torch.cat([flat(o) for o in out])
    return (out if isinstance(out, Tensor) else out.last_hidden_state).flatten()


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", WITHIN)
@torch.no_grad()
def test_an_encoder_within(name: str) -> None:
    make, prefix = WITHIN[name]
    model = make().eval()
    wanted, modules = flat(model(image())), list(model.modules())
    macs = ik.count_macs(model, (3, 32, 32))
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(flat(model(image())), wanted, rtol=1e-5, atol=1e-5)

    ik.set_keep_ratio(model, 0.5)
    blocks = ik.idle_blocks(model)
    assert len(blocks) == 3 and all(key.startswith(prefix) for key in blocks)
    assert [block.keep_ratio for block in blocks.values()] == [0.5, 0.25, 0.125]
    assert not torch.allclose(flat(model(image())), wanted, atol=1e-3)
    (layers, _) = ik.selections(model, image())
    assert [layer.name for layer in layers] == list(blocks)
    idle = ik.count_macs(model, (3, 32, 32))
    assert idle.total < 0.9 * macs.total and set(blocks) <= set(idle.per_layer) == set(macs.per_layer)
    config = json.loads(json.dumps(ik.idle_config(model)))
    assert config["schedule"] == [1.0, 0.5, 0.25, 0.125]

    assert torch.equal(flat(ik.remove_idle(model)(image())), wanted)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert ik.idle_config(ik.apply_idle(model, **config)) == config


@torch.no_grad()
def test_two_encoders() -> None:
    model = Two().eval()
    wanted, modules = model(image()), list(model.modules())
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(model(image()), wanted, rtol=1e-5, atol=1e-5)
    ik.set_keep_ratio(model, 0.5)
    schedules = [ik.idle_schedule(4, 0.5), ik.idle_schedule(8, 0.5)]
    found = {name: block.keep_ratio for name, block in ik.idle_blocks(model).items()}
    assert found == {
        f"{encoder}.blocks.{i}": ratio
        for encoder, schedule in zip(("first", "second"), schedules, strict=True)
        for i, ratio in enumerate(schedule)
        if ratio < 1
    }
    scorers = [block.scorer for block in ik.idle_blocks(model).values()]
    assert scorers == ["cls"] * 3 + ["mean"] * 6
    prefix = [block.num_prefix_tokens for block in ik.idle_blocks(model).values()]
    assert prefix == [1] * 3 + [0] * 6

    config = ik.idle_config(model)
    assert config == {"schedule": schedules, "scorer": "auto", "select": "top"}
    (layers, _) = ik.selections(model, image())
    assert [int(layer.kept.sum()) for layer in layers] == [8, 4, 2, 8, 8, 4, 4, 2, 2]
    macs = ik.count_macs(model, (3, 32, 32)).per_layer
    assert macs["first.blocks.0"] > macs["first.blocks.3"] and macs["second.blocks.0"] > macs["second.blocks.7"]
    idle = model(image())

    assert torch.equal(ik.remove_idle(model)(image()), wanted)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(ik.apply_idle(model, **config)(image()), idle)


@torch.no_grad()
def test_two_encoders_each_as_it_is_given() -> None:
    model = ik.apply_idle(Two().eval(), num_keep=[[None, 3, 3, 3], [None] * 7 + [5]])
    config = ik.idle_config(model)
    assert config["num_keep"] == [[None, 3, 3, 3], [None] * 7 + [5]]
    ik.set_keep_ratio(model, [[1.0, 0.5, 0.5, 0.5], [0.75] * 8])
    assert ik.idle_config(model)["schedule"] == [[1.0, 0.5, 0.5, 0.5], [0.75] * 8]
    wrong = "one list for each of the 2 encoders, which have 4, 8 layers"
    for given in ([0.5] * 12, [[0.5] * 4], [[0.5] * 4, [0.5] * 8, [0.5]]):
        with pytest.raises(ValueError, match=f"^set_keep_ratio: schedule must be {wrong}, got"):
            ik.set_keep_ratio(model, given)
    with pytest.raises(ValueError, match=f"^apply_idle: schedule must be {wrong}, got"):
        ik.apply_idle(Two(), schedule=[0.5] * 12)
    with pytest.raises(ValueError, match="one keep ratio for each of the 8 layers"):
        ik.apply_idle(Two(), schedule=[[0.5] * 4, [0.5] * 4])
    with pytest.raises(ValueError, match="one count for each of the 4 layers"):
        ik.apply_idle(Two(), num_keep=[[5] * 3, [5] * 8])
    assert ik.idle_config(model)["schedule"] == [[1.0, 0.5, 0.5, 0.5], [0.75] * 8]


def test_encoders_made_idle_one_by_one() -> None:
    """They are told apart by where their layers begin to count."""
    model = Two()
    ik.apply_idle(model.first, keep_ratio=0.5)
    assert ik.idle_config(model)["schedule"] == ik.idle_schedule(4, 0.5)
    with pytest.raises(
        ValueError, match="^apply_idle: model must be dense; call remove_idle first, got a model with 3"
    ):
        ik.apply_idle(model)
    ik.apply_idle(model.second, keep_ratio=0.75, scorer="mean")
    ik.set_keep_ratio(model, 0.5)
    assert ik.idle_config(model)["schedule"] == [ik.idle_schedule(4, 0.5), ik.idle_schedule(8, 0.5)]


def test_encoders_of_several_families() -> None:
    model = nn.ModuleList([MAKE[name]() for name in MAKE])
    ik.apply_idle(model, keep_ratio=0.5)
    config = ik.idle_config(model)
    assert len(config["schedule"]) == len(MAKE) and config["scorer"] == "auto"
    assert all(ratios == ik.idle_schedule(len(ratios), 0.5) for ratios in config["schedule"])
    ik.remove_idle(model)
    assert not ik.idle_blocks(model)


def test_one_encoder_that_cannot() -> None:
    model = Two()
    model.second.blocks[3] = ResPostBlock(32, 2)
    modules = list(model.modules())
    with pytest.raises(
        TypeError,
        match=r"^apply_idle: Two \(second\) cannot idle: .*ResPostBlock.* Call apply_idle on what can.*: first$",
    ):
        ik.apply_idle(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_wrapped_too_early() -> None:
    model = nn.Sequential(torch.compile(timm.create_model("vit_tiny_patch16_224", **SIZE, depth=2)), nn.ReLU())
    with pytest.raises(TypeError, match="model must not be wrapped yet, got one in OptimizedModule"):
        ik.apply_idle(model)
    # What is compiled beside the encoder is no hindrance.
    beside = Two()
    beside.head = torch.compile(beside.head)
    assert len(ik.idle_blocks(ik.apply_idle(beside))) == 9


def test_what_is_near_when_nothing_is_found() -> None:
    """A model of nobody's family with blocks that are known is told so, with where they stand."""
    encoder = timm.create_model("vit_tiny_patch16_224", **SIZE, depth=2)
    with pytest.raises(TypeError, match=r"It has 2 blocks that can idle, 1.0 \(Block\) and so on: put IdleBlock"):
        ik.apply_idle(nn.Sequential(encoder.patch_embed, encoder.blocks))
    with pytest.raises(TypeError, match="torch.nn.modules.linear.Linear. A family teaches it.*examples/own_vit.py"):
        ik.apply_idle(nn.Linear(3, 3))


def test_one_encoder_alone_can_be_tuned_or_trained() -> None:
    with pytest.raises(ValueError, match="^tune: model must be one with one encoder"):
        tune_schedule(Two(), Target("speedup", 1.2))
    with pytest.raises(TypeError, match="^IdleViTForTraining: model must be a model with its classifier"):
        ik.IdleViTForTraining(Two())


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_look_imports_no_library(library: str) -> None:
    script = (
        "import sys, torch, idlevit_kernels as ik\n"
        "try:\n    ik.apply_idle(torch.nn.Linear(3, 3))\nexcept TypeError:\n    pass\n"
        f"print({library!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr
