from __future__ import annotations

import math

import pytest

import idlevit_kernels as ik
from idlevit_kernels.schedule import num_kept


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
