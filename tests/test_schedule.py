from __future__ import annotations

import math

import pytest

import idlevit_kernels as ik
from idlevit_kernels.schedule import num_kept, schedule_cost


@pytest.mark.parametrize(
    "depth, stages",
    [
        (12, (3, 3, 3, 3)),  # DeiT: layers 3 to 11 idle
        (16, (4, 4, 4, 4)),  # LV-ViT-S: 4 to 15
        (20, (5, 5, 5, 5)),  # LV-ViT-M: 5 to 19
        (24, (6, 6, 6, 6)),
        (4, (1, 1, 1, 1)),
        (13, (3, 3, 3, 4)),  # the last stage takes the rest
        (3, (1, 1, 1, 0)),
        (1, (1, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5, 1.0, 1])
def test_values(depth: int, stages: tuple[int, ...], ratio: float) -> None:
    wanted = [ratio**power for power, length in enumerate(stages) for _ in range(length)]
    schedule = ik.idle_schedule(depth=depth, keep_ratio=ratio)
    assert schedule == pytest.approx(wanted, rel=1e-15)
    assert all(type(r) is float for r in schedule)


def test_kept_tokens_of_deit() -> None:
    """K of the three stages at 0.7 with 14 x 14 patches, and at least one token."""
    assert [num_kept(r, 196) for r in ik.idle_schedule(12, 0.7)] == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert [num_kept(r, 196) for r in ik.idle_schedule(12, 0.5)] == [196] * 3 + [98] * 3 + [49] * 3 + [24] * 3
    assert num_kept(0.01, 10) == num_kept(0.7, 1) == 1
    assert num_kept(1.0, 576) == 576


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_out_of_range(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^idle_schedule: depth must be at least 1, got {depth}"):
        ik.idle_schedule(depth, 0.7)


@pytest.mark.parametrize("depth", [12.0, "12", None, True])
def test_depth_of_the_wrong_type(depth: object) -> None:
    with pytest.raises(TypeError, match="^idle_schedule: depth must be an integer"):
        ik.idle_schedule(depth, 0.7)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^idle_schedule: keep_ratio must be in \(0, 1\], got"):
        ik.idle_schedule(12, ratio)


@pytest.mark.parametrize("ratio", ["0.7", None, True, [0.7]])
def test_ratio_of_the_wrong_type(ratio: object) -> None:
    with pytest.raises(TypeError, match=r"^idle_schedule: keep_ratio must be a number in \(0, 1\], got"):
        ik.idle_schedule(12, ratio)


def test_linear_falls_over_the_first_layers_and_stays() -> None:
    """The first layer idles already; the last step is the smallest ratio, to the last bit."""
    assert ik.idle_schedule(6, shape="linear", end=0.5, layers=4) == [0.875, 0.75, 0.625, 0.5, 0.5, 0.5]
    assert ik.idle_schedule(12, shape="linear", end=0.25)[7:] == [0.25] * 5  # two thirds of the depth
    assert ik.idle_schedule(12, shape="linear", end=0.25)[6] > 0.25
    assert ik.idle_schedule(5, shape="constant", end=0.3) == pytest.approx([0.3] * 5, rel=1e-15)
    for shape in ("linear", "constant"):
        assert ik.idle_schedule(1, shape=shape, end=0.5) == [0.5]
        assert ik.idle_schedule(7, 1.0, shape=shape) == ik.idle_schedule(7, shape=shape, end=1) == [1.0] * 7


@pytest.mark.parametrize("attention_share", [0.0, 0.08, 0.4])
@pytest.mark.parametrize("depth", [12, 13, 24])
@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
def test_every_shape_of_a_keep_ratio_costs_the_same(depth: int, ratio: float, attention_share: float) -> None:
    wanted = schedule_cost(ik.idle_schedule(depth, ratio), attention_share)
    for shape in ("linear", "constant", "stages"):
        found = ik.idle_schedule(depth, ratio, shape=shape, attention_share=attention_share)
        assert schedule_cost(found, attention_share) == pytest.approx(wanted, rel=1e-12), shape
        of_macs = ik.idle_schedule(depth, shape=shape, macs=wanted, attention_share=attention_share)
        assert of_macs == pytest.approx(found, rel=1e-9), shape
    assert ik.idle_schedule(depth, shape="linear", macs=1.0) == [1.0] * depth


def test_cost_of_a_schedule_is_that_of_tokens_and_of_pairs_of_tokens() -> None:
    assert schedule_cost([1.0, 0.5]) == 0.75
    assert schedule_cost([1.0, 0.5], attention_share=0.2) == pytest.approx((1 + 0.8 * 0.5 + 0.2 * 0.25) / 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep_ratio": 0.7, "end": 0.5}, "how much is kept must be given by one of keep_ratio, end and macs, got"),
        ({"keep_ratio": 0.7, "macs": 0.5}, "how much is kept must be given by one of keep_ratio, end and macs, got"),
        ({"end": 0.5}, 'end must be None for shape "stages"'),
        ({"keep_ratio": 0.7, "layers": 3}, 'layers must be None for shape "stages"'),
        ({"end": 0.5, "shape": "constant", "layers": 3}, 'layers must be None for shape "constant"'),
        ({"end": 0.5, "shape": "linear", "layers": 0}, "layers must be an integer from 1 to the depth 12, got 0"),
        ({"end": 0.5, "shape": "linear", "layers": 13}, "layers must be an integer from 1 to the depth 12, got 13"),
        ({"end": 0.0, "shape": "linear"}, r"end must be in \(0, 1\], got"),
        ({"macs": 1.5}, r"macs must be in \(0, 1\], got"),
        ({"keep_ratio": 0.7, "shape": "steps"}, "shape must be one of 'stages', 'linear', 'constant', got 'steps'"),
        ({"keep_ratio": 0.7, "attention_share": 1.0}, r"attention_share must be in \[0, 1\), got"),
        ({"macs": 0.2, "shape": "linear"}, 'macs must be enough for shape "linear", whose layers take 0.292'),
        ({"keep_ratio": 0.1, "shape": "linear"}, "keep_ratio must be enough .* got 0.1, which is 0.278 of them"),
    ],
)
def test_arguments_of_shapes(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^idle_schedule: {message}"):
        ik.idle_schedule(12, **arguments)
