"""Pictures show what the layers selected, at the place where it lies in the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import idlevit_kernels as ik
from idlevit_kernels.cli import app
from idlevit_kernels.models import lvvit  # noqa: F401  registers its names with timm
from idlevit_kernels.models.recording import selections

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    options = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10} | options
    model = timm.create_model(name, **options).eval()
    return ik.apply_idle(model, 0.5)


def picture(seed: int = 0, size: tuple[int, int] = (80, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_selections_are_those_of_the_blocks(options: dict) -> None:
    model, images = tiny(**options), torch.randn(2, 3, 64, 64)
    found = selections(model, images)
    with torch.no_grad():
        indices = ik.IdleViTForTraining(model, cut="none")(images).indices
    for b, layers in enumerate(found):
        assert [layer.name for layer in layers] == ["blocks.1", "blocks.2", "blocks.3"]
        for layer, kept in zip(layers, indices, strict=True):
            places = kept[b][kept[b] >= model.num_prefix_tokens] - model.num_prefix_tokens
            assert layer.kept.shape == layer.scores.shape == (4, 4)
            assert layer.kept.flatten().nonzero().flatten().tolist() == places.tolist()
            on, off = layer.scores[layer.kept], layer.scores[~layer.kept]
            assert on.min() >= off.max()


def test_images_that_are_not_square() -> None:
    model = tiny(img_size=(64, 96))
    (layers,) = selections(model, torch.randn(1, 3, 64, 96))
    assert layers[0].kept.shape == (4, 6) and int(layers[0].kept.sum()) == 12


def test_windows_lie_where_they_are_in_the_image() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, depths=(1, 2), embed_dim=32).eval()
    ik.apply_idle(model, schedule=[0.5, 0.5, 0.5])
    (layers,) = selections(model, torch.randn(1, 3, 112, 112))
    assert [layer.kept.shape for layer in layers] == [(28, 28), (14, 14), (14, 14)]
    for layer in layers[:2]:  # not shifted: K = 24 of the 49 tokens of each window
        windows = layer.kept.unfold(0, 7, 7).unfold(1, 7, 7)
        assert (windows.sum((2, 3)) == 24).all()
        on = layer.scores.masked_fill(~layer.kept, torch.inf).unfold(0, 7, 7).unfold(1, 7, 7).amin((2, 3))
        off = layer.scores.masked_fill(layer.kept, -torch.inf).unfold(0, 7, 7).unfold(1, 7, 7).amax((2, 3))
        assert (on >= off).all()
    shifted = layers[2].kept.roll((-3, -3), (0, 1)).unfold(0, 7, 7).unfold(1, 7, 7)
    assert (shifted.sum((2, 3)) == 24).all()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny().train()
    selections(model, torch.randn(1, 3, 64, 64))
    assert all(module.training for module in model.modules())
    assert not any(block._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("name", ["vit", "lvvit", "swin"])
def test_one_image_in_every_form(tmp_path: Path, name: str) -> None:
    if name == "vit":
        model = tiny(depth=8)
    elif name == "lvvit":
        model = ik.apply_idle(timm.create_model("lvvit_tiny_patch16_224", img_size=64, depth=4).eval(), 0.5)
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 3), embed_dim=32).eval()
        ik.apply_idle(model, 0.5)
    size = 56 if name == "swin" else 64
    path = tmp_path / "image.png"
    picture().save(path)
    for image in (picture(), path, str(path), np.asarray(picture()), torch.randn(3, size, size)):
        figure = ik.visualize(model, image)
        titles = [axis.get_title() for axis in figure.axes]
        assert (
            sum(title.startswith("layer") for title in titles) == titles.count("scores") == len(ik.idle_blocks(model))
        )
        assert "image" in titles and any(t.startswith("chosen") for t in titles)
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as drawn:
        assert np.asarray(drawn).std() > 10


def test_several_images_are_a_gallery_with_what_came_back() -> None:
    model = tiny()
    figure = ik.visualize(model, [picture(0), picture(1)])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("image") == 2 and sum(t.startswith("layer") for t in titles) == 6
    back = next(axis for axis in figure.axes if axis.get_title().startswith("back"))
    shown = back.images[0].get_array()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)})
    (layers,) = selections(model, transform(picture(0))[None])
    wanted = sum((b.kept & ~a.kept).int() for a, b in zip(layers, layers[1:], strict=False))
    np.testing.assert_array_equal(shown, wanted)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="visualize: model must be idle .call apply_idle first., got a dense"):
        ik.visualize(ik.remove_idle(tiny()), picture())
    with pytest.raises(TypeError, match="visualize: model must be a torch.nn.Module"):
        ik.visualize("model", torch.randn(3, 64, 64))
    model = tiny()
    for image, expected in (
        (torch.randn(2, 3, 64, 64), r"a float tensor \[channels, height, width\]"),
        (torch.randn(2, 64, 64), "of 1 or 3 channels"),
        ([], "at least one"),
        ([torch.randn(3, 64, 64), torch.randn(3, 32, 32)], "images of one size"),
        (3, "a PIL image, a path, an array"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"visualize: image must be .*{expected}"):
            ik.visualize(model, image)


def test_the_command(tmp_path: Path) -> None:
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    output = tmp_path / "idling.png"
    options = ["--model", "test_vit", "--image-size", "64", "--keep-ratio", "0.5", "-o", str(output)]
    for images in ([tmp_path / "0.png"], [tmp_path / "0.png", tmp_path / "1.png"]):
        result = CliRunner().invoke(app, ["visualize", *map(str, images), *options])
        assert result.exit_code == 0, result.output
        assert str(output) in result.stdout and "random weights" in result.stdout
        with Image.open(output) as drawn:
            assert min(drawn.size) > 300
        output.unlink()
    for arguments in (["missing.png"], [str(tmp_path / "0.png"), "-o", str(tmp_path / "missing" / "x.png")]):
        result = CliRunner().invoke(app, ["visualize", *options, *arguments])
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and line.startswith("idlevit: ") and "missing" in line


def test_a_run_is_drawn_on_its_own_images_or_others(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "idling.png"
    trained = CliRunner().invoke(app, ["train", "--output", str(run), "--weights", "none", "--epochs", "1"])
    assert trained.exit_code == 0, trained.output
    dense = ["train", "--output", str(tmp_path / "dense"), "--keep-ratio", "1", "--epochs", "6"]
    assert CliRunner().invoke(app, dense).exit_code == 0

    def draw(*options: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["visualize", "--run", str(run), "-o", str(output), *options])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    assert "random weights" not in draw()
    with Image.open(output) as drawn:
        assert min(drawn.size) > 300
    assert draw("--keep-ratio", "0.4")
    picture().save(tmp_path / "photo.png")
    assert "of 1 channel" in draw(str(tmp_path / "photo.png"), code=2)
    for option in (("--model", "deit_small_patch16_224"), ("--pretrained",), ("--image-size", "24")):
        assert "left out where --run is given" in draw(*option, code=2)
    of_dense = CliRunner().invoke(app, ["visualize", "--run", str(tmp_path / "dense")])
    assert "keep_ratio must be given: the run trained a dense model" in of_dense.stderr
    assert "directory that holds one" in CliRunner().invoke(app, ["visualize", "--run", str(tmp_path)]).stderr
    assert "(or pass --run)" in CliRunner().invoke(app, ["visualize"]).stderr
