from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

import idlevit_kernels as ik
from idlevit_kernels.measure import roofline
from idlevit_kernels.measure.roofline import GPUS, Device, Shape, dense_block_steps, idle_block_steps, predict

SHAPES = [roofline.deit_s(b, stage) for b in (1, 8, 256) for stage in (1, 2, 3)]


def flops(steps: list[roofline.Step]) -> int:
    return sum(step.flops for step in steps)


def named(steps: list[roofline.Step], name: str) -> roofline.Step:
    (found,) = (step for step in steps if step.name == name)
    return found


def test_flops_are_those_of_count_macs() -> None:
    with torch.device("meta"):
        model = ik.apply_idle(timm.create_model("deit_small_patch16_224"), keep_ratio=0.7)
    counted = ik.count_macs(model).per_layer
    for stage in (1, 2, 3):
        shape = roofline.deit_s(1, stage)
        assert flops(idle_block_steps(shape)) == 2 * counted[f"blocks.{3 * stage}"]
    everything = dataclasses.replace(shape, n=shape.T)
    assert flops(dense_block_steps(everything)) == 2 * counted["blocks.0"]


def test_stages_keep_the_tokens_of_the_schedule() -> None:
    assert [roofline.deit_s(1, stage).n for stage in (1, 2, 3)] == [138, 97, 68]


def test_bytes_by_hand() -> None:
    """B 2, T 5, n 3, C 4 in bfloat16: x has 80 bytes, a [B, n, C] 48, scores 40, indices 48, a norm's parameters 16."""
    shape = Shape(B=2, T=5, n=3, C=4, H=2)
    steps = idle_block_steps(shape)
    assert named(steps, "token_scores").bytes == 80 + 16 + 16 + 40
    assert named(steps, "select_gather_norm").bytes == 40 + 48 + 48 + 48 + 16
    assert named(steps, "gather_add_norm").bytes == 48 + 4 * 48 + 16
    assert (
        named(steps, "scatter_add_tokens").bytes == 48 + 2 * 48 + 32 + 80
    )  # indices, tokens and branch, idle rows; output
    assert named(idle_block_steps(shape, inplace=True), "scatter_add_tokens_").bytes == 48 + 3 * 48
    assert named(steps, "qkv").bytes == 48 + 2 * (4 * 12 + 12) + 3 * 48
    assert named(steps, "attention").bytes == 4 * 48
    assert named(steps, "cls_direction").bytes == 6 * 16 + 16 + 2 * (2 * 16 + 4)
    fc1 = 48 + 2 * (4 * 16 + 16) + 4 * 48
    assert named(steps, "fc1 + GELU").bytes == fc1 + 2 * 4 * 48
    assert named(idle_block_steps(shape, fused_gelu=True), "fc1 + GELU").bytes == fc1


def test_scores_are_float32_unless_tokens_are_wider() -> None:
    shape = Shape(B=2, T=5, n=3, C=4, H=2, dtype=torch.float64)
    assert named(idle_block_steps(shape), "select_gather_norm").bytes == 80 + 48 + 2 * 192 + 64


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("field", ["B", "T", "n", "C"])
def test_more_work_takes_longer(field: str, device: Device) -> None:
    for shape in SHAPES:
        more = dataclasses.replace(shape, **{field: getattr(shape, field) + 8})
        assert predict(more, device).idle > predict(shape, device).idle
        assert predict(more, device).dense >= predict(shape, device).dense


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_faster_devices_and_less_traffic_take_less(shape: Shape) -> None:
    h200, h100, a100, _ = GPUS
    assert predict(shape, h200).idle < predict(shape, h100).idle < predict(shape, a100).idle
    assert predict(shape, h200, inplace=True).idle < predict(shape, h200).idle
    assert h200.seconds(idle_block_steps(shape, fused_gelu=True)) < h200.seconds(idle_block_steps(shape))


def test_seconds_take_the_tighter_of_the_two_bounds() -> None:
    device = Device("", flops=10.0, bandwidth=100.0, launch=0.5)
    assert device.seconds([roofline.Step("", 20, 100)]) == 2.5
    assert device.seconds([roofline.Step("", 20, 400, kernels=2), roofline.Step("", 10, 0)]) == 5.0 + 1.5


def test_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    roofline.main(measure=True, seconds=0.1, batch=[1])
    text = capsys.readouterr().out
    for word in (*(d.name for d in GPUS), "select_gather_norm", "idle block", "Not measured", "overhead\n"):
        assert word.strip() in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("1 ") and "/" not in line]
    assert [row[1] for row in rows] == ["138", "97", "68"]
    assert all(len(row) == 11 and float(value) > 0 for row in rows for value in row)
