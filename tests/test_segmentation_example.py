"""The worked example of dense prediction runs, at a size that takes seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import idlevit_kernels as ik

for needed in ("matplotlib", "skimage", "sklearn"):
    pytest.importorskip(needed)

FILE = Path(__file__).parents[1] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segmentation_example", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_it_runs(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setenv("MPLBACKEND", "agg")
    app, picture = typer.Typer(), tmp_path / "picture.png"
    app.command()(example.main)
    sizes = {"--seeds": 2, "--steps": 2, "--more-steps": 1, "--batch": 2, "--size": 32, "--width": 32}
    options = sizes | {"--test-images": 5, "--seconds": 0.1, "--output": picture}
    result = CliRunner().invoke(app, [str(part) for option in options.items() for part in option])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000


def test_images_and_their_classes(example: ModuleType) -> None:
    images, classes = example.scenes(20, 64, train=True, seed=3)
    assert images.shape == (20, 3, 64, 64) and classes.shape == (20, 64, 64)
    assert images.isfinite().all() and -2 < float(images.mean()) < 2
    assert classes.unique().tolist() == [0, 1, 2, 3]
    again, _ = example.scenes(20, 64, train=True, seed=3)
    assert torch.equal(images, again)
    assert not torch.equal(images, example.scenes(20, 64, train=False, seed=3)[0])


def test_mean_iou(example: ModuleType) -> None:
    """Against the definition, class by class; a class that is neither there nor predicted does not count."""
    truth = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    logits = torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    found = example.mean_iou(lambda image: logits, torch.zeros(1, 3, 2, 3), truth)
    assert found == pytest.approx(100 * (1 / 3 + 2 / 3 + 1 / 2) / 3)


@torch.no_grad()
def test_feature_maps_and_kept_tokens_agree(example: ModuleType) -> None:
    """What a block leaves out is in the next feature map at the same place, unchanged."""
    model = example.segmenter(64, 32).eval()
    ik.apply_idle(model.backbone, schedule=[1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.25, 1.0])
    seen: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.backbone.model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0] != out).any(-1)[:, 1:]}))
    for image, layers in enumerate(example.selections(model, torch.randn(2, 3, 64, 64))):
        assert [layer.name for layer in layers] == ["backbone.model.blocks.2", "backbone.model.blocks.6"]
        assert [int(layer.kept.sum()) for layer in layers] == [32, 16]
        for i, layer in zip((2, 6), layers, strict=True):
            assert torch.equal(layer.kept.flatten(), seen[i][image])


@pytest.mark.parametrize("size", [32, 256])
def test_a_folder_of_materials_to_train_on(tmp_path: Path, size: int) -> None:
    command = [sys.executable, str(FILE.with_name("materials.py")), str(tmp_path), "--train", "1", "--val", "1"]
    contents = []
    for _ in range(2):
        done = subprocess.run([*command, "--size", str(size)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        contents.append({path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.png")})
    assert contents[0] == contents[1] and len(contents[0]) == len(set(contents[0].values())) == 6
    with Image.open(tmp_path / "train" / "brick" / "0000.png") as image:
        assert image.size == (size, size)
