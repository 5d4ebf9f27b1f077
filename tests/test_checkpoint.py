"""Checkpoints in the layout that the authors' scripts write."""

from __future__ import annotations

import argparse
import fractions
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import idlevit_kernels as ik
import idlevit_kernels.models.lvvit  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
ARCHITECTURES = {
    "DeiT": ("deit_small_patch16_224", SMALL),
    "LV-ViT": ("lvvit_small_patch16_224", SMALL),
    "distilled": ("deit_small_distilled_patch16_224", SMALL),
}


def make(architecture: str = "DeiT") -> nn.Module:
    name, kwargs = ARCHITECTURES[architecture]
    return timm.create_model(name, **kwargs).eval()


def saved(path: Path, model: nn.Module, **changes: object) -> Path:
    """A file as IdleViT's training script writes it."""
    average = {key: value + 0.25 for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    model.zero_grad()
    content = {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-5], "t_in_epochs": True},
        "epoch": 29,
        "model_ema": average,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(arch="deit_small", base_rate=0.6, opt_betas=None, world_size=2),
    }
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)
    return path


def assert_holds(model: nn.Module, weights: dict) -> None:
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[key], weights[key]) for key in state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back(architecture: str, tmp_path: Path) -> None:
    source = make(architecture)
    file = saved(tmp_path / "checkpoint.pth", source)
    dense, idle = make(architecture), ik.apply_idle(make(architecture), keep_ratio=0.5)
    assert ik.load_released(dense, file) is dense and not ik.idle_blocks(dense)
    ik.load_released(idle, file)
    weights = source.state_dict()
    assert_holds(dense, weights)
    assert_holds(idle, weights)
    source.load_state_dict({key: torch.zeros_like(value) for key, value in weights.items()})
    torch.save({"model": idle.state_dict()}, tmp_path / "again.pth")
    wanted = torch.load(file, weights_only=False)["model"]
    source.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True)["model"], strict=True)
    assert_holds(source, wanted)


def test_average(tmp_path: Path) -> None:
    model = make()
    before = {key: value + 0.25 for key, value in model.state_dict().items()}
    file = saved(tmp_path / "checkpoint.pth", model)
    assert_holds(ik.load_released(make(), file, ema=True), before)
    file = saved(tmp_path / "none.pth", model, model_ema=None)
    with pytest.raises(
        ValueError, match="^load_released: file must be.*'model_ema' or 'state_dict_ema', got.*optimizer"
    ):
        ik.load_released(make(), file, ema=True)


def test_other_layouts(tmp_path: Path) -> None:
    """DeiT's, LV-ViT's bare weights, timm's training script, distributed training, the format before zip."""
    model = make("LV-ViT")
    weights = model.state_dict()
    layouts = {
        "bare": weights,
        "timm": {"state_dict": weights, "arch": "lvvit_s", "metric": 83.3, "version": 2},
        "distributed": {"model": {f"module.{key}": value for key, value in weights.items()}},
    }
    for name, content in layouts.items():
        for zipped in (True, False):
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
            assert_holds(ik.load_released(make("LV-ViT"), str(tmp_path / name)), weights)


@pytest.mark.parametrize(
    "architecture, schedule, dense, wanted",
    [
        ("DeiT", "inference", 3, [3, 3, 3]),
        ("DeiT", "training", 4, [3, 3, 2]),
        ("LV-ViT", "inference", 4, [4, 4, 4]),
        ("LV-ViT", "training", 4, [4, 4, 4]),
    ],
)
def test_schedule(architecture: str, schedule: str, dense: int, wanted: list[int], tmp_path: Path) -> None:
    file = saved(tmp_path / "checkpoint.pth", make(architecture))
    for given, ratio in ((None, 0.6), (0.5, 0.5)):
        model = ik.load_released(make(architecture), file, schedule=schedule, keep_ratio=given)
        ratios = [ratio**stage for stage, count in enumerate(wanted, 1) for _ in range(count)]
        assert {name: block.keep_ratio for name, block in ik.idle_blocks(model).items()} == {
            f"blocks.{dense + i}": r for i, r in enumerate(ratios)
        }


def test_bad_schedule(tmp_path: Path) -> None:
    model = make()
    file = saved(tmp_path / "checkpoint.pth", model, args=None)
    with pytest.raises(ValueError, match="^load_released: keep_ratio must be given: the file does not name"):
        ik.load_released(model, file, schedule="training")
    with pytest.raises(ValueError, match="^load_released: schedule must be 'inference', 'training' or None"):
        ik.load_released(model, file, schedule="evaluation")
    with pytest.raises(ValueError, match="^load_released: keep_ratio must be None where no schedule"):
        ik.load_released(model, file, keep_ratio=0.5)
    with pytest.raises(ValueError, match="^apply_idle: model must be dense"):
        ik.load_released(ik.apply_idle(model), file, schedule="training", keep_ratio=0.5)


def test_another_architecture_names_the_first_ten_keys(tmp_path: Path) -> None:
    model = make("LV-ViT")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = saved(tmp_path / "checkpoint.pth", make("distilled"))
    with pytest.raises(ValueError) as caught:
        ik.load_released(model, file)
    message = str(caught.value)
    missing = [key for key in before if "conv" in key or "bn" in key or "aux" in key or "blocks.12." in key]
    assert message.startswith("load_released: file must hold exactly the weights of the model, a LVViT, but of its")
    assert f"missing: {', '.join(missing[:10])}, ...;" in message and missing[10] not in message
    assert "unexpected: dist_token, " in message
    assert "of another shape: pos_embed ([1, 6, 48] instead of [1, 5, 48]), " in message
    assert_holds(model, before)


def test_another_number_of_classes(tmp_path: Path) -> None:
    file = saved(tmp_path / "checkpoint.pth", make())
    model = timm.create_model("deit_small_patch16_224", **(SMALL | {"num_classes": 9}))
    with pytest.raises(ValueError, match=r"2 of another shape: head.weight \(\[7, 48\] instead of \[9, 48\]\), head.b"):
        ik.load_released(model, file)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    model = make()
    saved(file, model, args=fractions.Fraction(1, 2))
    with pytest.raises(ValueError, match="^load_released: file must be.*got .*which holds fractions.Fraction"):
        ik.load_released(model, file)
    saved(file, model)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="^load_released: file must be a checkpoint, got.*cut off or damaged"):
        ik.load_released(model, file)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="^load_released: file must be.*which is no checkpoint"):
        ik.load_released(model, file)
    torch.save([1, 2], file)
    with pytest.raises(TypeError, match="^load_released: file must be a checkpoint that holds a dict"):
        ik.load_released(model, file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="^load_released: file must be a checkpoint with weights.*entries epoch"):
        ik.load_released(model, file)
    with pytest.raises(FileNotFoundError):
        ik.load_released(model, tmp_path / "none.pth")
    with pytest.raises(TypeError, match="^load_released: file must be the path"):
        ik.load_released(model, 3)
    with pytest.raises(TypeError, match="^load_released: model must be a torch.nn.Module"):
        ik.load_released("deit", file)
