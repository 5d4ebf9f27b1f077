"""Fidelity without labels: what each measure says of outputs that are made up, and of real models."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch

import idlevit_kernels as ik
from idlevit_kernels.measure.fidelity import Outputs, compare, compare_outputs, neighbours, outputs_of

pytestmark = pytest.mark.usefixtures("one_thread")


def some_outputs(M: int = 8, N: int = 9, C: int = 16, P: int = 1, classes: int = 4) -> Outputs:
    torch.manual_seed(0)
    return Outputs(torch.randn(M, P + N, C), P, torch.randn(M, classes))


def test_of_the_same_outputs_nothing_changed() -> None:
    found = compare_outputs(some_outputs(), some_outputs())
    for name, values in found.values.items():
        assert values.shape == (8,)
        assert values.allclose(torch.full((8,), 0.0 if name == "error" else 1.0), atol=1e-6), name
    assert found.distance() < 1e-6 and "change little" in found.advice()


def test_of_another_image_every_measure_is_its_floor() -> None:
    """The mean over all pairs of different images is what the floors say."""
    dense = some_outputs(M=6)
    shifted = [
        compare_outputs(dense, Outputs(dense.tokens.roll(s, 0), 1, dense.logits.roll(s, 0))) for s in range(1, 6)
    ]
    for name in ("cls", "pooled", "patch", "error", "same_class"):
        mean = sum(found.mean(name) for found in shifted) / 5
        assert shifted[0].floors[name] == pytest.approx(mean, abs=1e-5), name
    assert shifted[0].distance() == pytest.approx(1, abs=0.3) and "change much" in shifted[0].advice()
    assert shifted[0].floors["cls_nearest"] == 1 / 5 and shifted[0].floors["cls_neighbours"] == 1


def test_each_image_has_its_own_value_and_the_worst_is_named() -> None:
    dense = some_outputs()
    tokens = dense.tokens.clone()
    tokens[3, 1:] = -tokens[3, 1:]
    tokens[5, 2] *= 2  # in length only
    found = compare_outputs(dense, Outputs(tokens, 1), names=[f"image {i}" for i in range(8)])
    assert found.values["patch"][3] == pytest.approx(-1, abs=1e-6) and found.values["error"][3] == pytest.approx(4)
    assert found.values["cls"].allclose(torch.ones(8))
    assert found.values["patch"][5] == pytest.approx(1, abs=1e-6) and 0 < found.values["error"][5] < 1
    assert found.worst(1) == ["image 3"] and found.worst(2, "error") == ["image 3", "image 5"]
    assert "same_class" not in found.values
    wanted = found.values["patch"].std() / math.sqrt(8)
    assert found.standard_error("patch") == pytest.approx(float(wanted))
    assert next(iter(found.table().columns[0].cells)) == "cosine of the class token"


def test_neighbours_are_the_most_similar_others() -> None:
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 2.0])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, 6).unsqueeze(1)
    assert neighbours(features, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1], [3, 2]]
    swapped = features[[0, 1, 2, 4, 3]]
    dense, idle = (Outputs(f.unsqueeze(1).repeat(1, 3, 1), 1) for f in (features, swapped))
    found = compare_outputs(dense, idle)
    assert found.values["cls_nearest"].tolist() == [1, 1, 1, 0, 0]


def test_without_prefix_tokens_and_with_one_image() -> None:
    found = compare_outputs(some_outputs(P=0), some_outputs(P=0))
    assert "cls" not in found.values and "pooled_nearest" in found.values
    alone = compare_outputs(some_outputs(M=1), some_outputs(M=1))
    assert "cls_nearest" not in alone.values and math.isnan(alone.floors["patch"])
    assert math.isnan(alone.standard_error("cls"))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^compare_outputs: idle must be tokens \[8, 10, 16\], as dense has, got"):
        compare_outputs(some_outputs(), some_outputs(N=8))
    with pytest.raises(ValueError, match="^compare_outputs: idle must be 1 prefix tokens, as dense has, got 0"):
        compare_outputs(some_outputs(N=9), some_outputs(N=10, P=0))
    with pytest.raises(ValueError, match="^compare_outputs: names must be one for each of the 8 images, got 2 names"):
        compare_outputs(some_outputs(), some_outputs(), names=["a", "b"])
    with pytest.raises(TypeError, match="^outputs_of: model must be a model with forward_features"):
        outputs_of(torch.nn.Linear(1, 1), torch.zeros(1, 3, 8, 8))


def test_of_models() -> None:
    """As dense it changes nothing; the less is kept, the more changes; training mode is given back."""
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    dense.blocks[2].train()
    images = torch.randn(6, 3, 64, 64)
    errors = []
    for ratio in (1.0, 0.9, 0.3):
        idle = ik.apply_idle(copy.deepcopy(dense), keep_ratio=ratio)
        found = compare(dense, idle, images, batch_size=4)
        assert set(found.values) >= {"cls", "pooled", "patch", "error", "same_class", "pooled_neighbours"}
        errors.append(found.mean("error"))
    assert errors[0] < 1e-9 < errors[1] < errors[2]
    assert dense.blocks[2].attn.training and not dense.blocks[1].training
    for bad in (images[0], "images"):
        with pytest.raises(TypeError, match=r"^compare: images must be a tensor \[M, channels, height, width\]"):
            compare(dense, dense, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^compare: images must be at least one image"):
        compare(dense, dense, images[:0])
