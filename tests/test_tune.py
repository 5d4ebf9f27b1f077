"""Schedules for a budget: what fits is taken, and as many tokens as fit; nothing here asserts a speed."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import idlevit_kernels as ik
import idlevit_kernels.models.lvvit
from idlevit_kernels.block import IdleBlock
from idlevit_kernels.block.latency import BlockInput, slower_than_dense
from idlevit_kernels.block.timing import Timing
from idlevit_kernels.cli import app
from idlevit_kernels.measure import tune
from idlevit_kernels.measure.staircase import steps, token_counts
from idlevit_kernels.measure.tune import Target, fastest, fill, tune_schedule
from idlevit_kernels.models.inputs import block_inputs
from idlevit_kernels.schedule import num_kept, read_schedule

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10}


def tiny(**options) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SMALL | options).eval()


@pytest.mark.parametrize(("num_tokens", "prefix"), [(196, 1), (576, 1), (1369, 5), (16, 1), (3, 0), (1, 1)])
def test_token_counts_fill_tiles(num_tokens: int, prefix: int) -> None:
    counts = token_counts(num_tokens, prefix)
    assert counts[0] == num_tokens and counts == sorted(set(counts), reverse=True)
    assert min(counts) >= 1 and (num_tokens < 20 or 9 <= len(counts) <= 22)
    gaps = {a - b for a, b in itertools.pairwise(counts[1:])}
    assert len(gaps) <= 1 and all((k + prefix) % gap == 0 for k in counts[1:] for gap in gaps)


def test_a_step_ends_where_fewer_tokens_save_time() -> None:
    seconds = {100: 10.0, 80: 9.99, 60: 8.0, 50: 8.1, 40: 7.99, 20: 4.0}
    assert steps(seconds) == [100, 60, 20]
    assert steps({100: 5.0, 50: 6.0, 10: 5.0}) == [100]  # idling does not pay


@pytest.mark.parametrize("budget", [12.0, 11.0, 9.3, 7.77, 6.0, 5.1])
def test_fill_meets_the_budget_with_no_token_to_add(budget: float) -> None:
    counts = [10, 8, 6, 4, 2]
    costs = {k: k / 10 for k in counts}
    kept = fill(costs, counts, 12, budget)
    assert kept is not None and set(kept) <= set(counts)
    assert kept == sorted(kept, reverse=True) and kept[:3] == [10, 10, 10]
    total = sum(costs[k] for k in kept)
    assert total <= budget
    if total < 12:
        for i in range(1, 12):  # no layer can take a step more and stay below the one before it
            higher = next((k for k in reversed(counts) if k > kept[i]), None)
            if higher is not None and higher <= kept[i - 1]:
                assert total - costs[kept[i]] + costs[higher] > budget


def test_fill_says_when_nothing_fits() -> None:
    costs = {10: 1.0, 5: 0.5}
    assert fastest([10, 5], 4) == [10, 5, 5, 5]
    assert fill(costs, [10, 5], 4, 2.5) == [10, 5, 5, 5]
    assert fill(costs, [10, 5], 4, 2.49) is None


def test_a_target_of_macs_is_met_by_the_whole_model() -> None:
    model = tiny(img_size=128)
    dense = ik.count_macs(model).total
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = tune_schedule(model, Target("macs", 0.7 * dense), batch=2, seconds=0.2)
    assert not ik.idle_blocks(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [num_kept(r, 64) for r in tuned.schedule] == tuned.num_keep and tuned.num_image_tokens == 64
    ik.apply_idle(model, schedule=tuned.schedule)
    assert ik.count_macs(model).total == tuned.macs == tuned.reached <= 0.7 * dense
    assert tuned.deviation == pytest.approx(tuned.macs / (0.7 * dense) - 1)


@pytest.mark.parametrize("kind", ["ms", "speedup"])
def test_a_target_of_time_gives_a_schedule_and_what_it_measured(kind: str) -> None:
    progress: list[float] = []
    target = Target(kind, 1e4 if kind == "ms" else 0.01)  # the dense model meets it
    tuned = tune_schedule(tiny(), target, seconds=0.2, on_progress=lambda _, done: progress.append(done))
    assert tuned.schedule == [1.0] * 4
    reached = {"ms": tuned.idle.median * 1e3, "speedup": tuned.dense.median / tuned.idle.median}
    assert tuned.reached == reached[kind]
    assert set(tuned.steps) <= set(tuned.staircase)
    assert progress == sorted(progress) and progress[-1] <= 1.001


def test_a_target_out_of_reach_is_named_with_what_is_reached() -> None:
    with pytest.raises(ValueError, match=r"tune: target-ms must be at least .* the fewest tokens take, got 1e-05"):
        tune_schedule(tiny(), Target("ms", 1e-5), seconds=0.2)
    with pytest.raises(ValueError, match=r"tune: target-speedup must be at most"):
        tune_schedule(tiny(), Target("speedup", 1e5), seconds=0.2)
    with pytest.raises(ValueError, match=r"tune: target-macs must be at least 0\.0"):
        tune_schedule(tiny(), Target("macs", 10.0), seconds=0.2)


def test_bad_input() -> None:
    for bad, expected in ((True, "a number above 0"), (0, "above 0"), ("2", "a number above 0")):
        with pytest.raises((TypeError, ValueError), match=f"tune: target-ms must be {expected}"):
            tune_schedule(tiny(), Target("ms", bad))
    with pytest.raises(ValueError, match="target.kind must be ms, speedup or macs"):
        tune_schedule(tiny(), Target("fps", 3))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        tune_schedule(tiny(), Target("ms", 3), batch=0)
    with pytest.raises(ValueError, match="model must be dense"):
        tune_schedule(ik.apply_idle(tiny(), 0.5), Target("ms", 3))


class _Slow(IdleBlock):
    def forward(self, x: Tensor, **others: object) -> Tensor:  # type: ignore[override]
        time.sleep(0.01)
        return super().forward(x)


def test_layers_are_compared_idle_and_dense() -> None:
    model = tiny()
    fast = [IdleBlock(block, 0.5) for block in model.blocks[:2]]
    slow = [_Slow(block, 1.0) for block in model.blocks[:2]]
    inputs = [BlockInput((1, 17, 64))] * 2
    assert slower_than_dense(slow, list(model.blocks[:2]), inputs) == [True, True]
    assert slower_than_dense(fast, slow, inputs) == [False, False]


def test_block_inputs_are_those_of_a_forward_pass() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2).eval()
    found = block_inputs(model, list(model.blocks), batch=3)
    assert [given.shape for given in found] == [(3, 17, 192)] * 2
    assert all(given.named["rope"].shape[-2] == 16 for given in found)


def test_measuring_leaves_a_training_model_as_it_was() -> None:
    model = timm.create_model("lvvit_tiny_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=3).train()
    model.blocks[1].eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    block_inputs(model, list(model.blocks), 2)
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_adaptive_leaves_layers_as_they_are_or_dense() -> None:
    image = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    model = tiny()
    torch.manual_seed(1)
    ik.apply_idle(adaptive := tiny(), 0.5, adaptive_batch=2)
    ratios = [block.keep_ratio for block in adaptive.blocks]
    assert all(r in (1.0, wanted) for r, wanted in zip(ratios, [1.0, 0.5, 0.25, 0.125], strict=True))
    with torch.no_grad():
        torch.testing.assert_close(adaptive(image), ik.apply_idle(model, schedule=ratios)(image))
    with pytest.raises(ValueError, match="apply_idle: adaptive_batch must be at least 1"):
        ik.apply_idle(tiny(), 0.5, adaptive_batch=0)
    with pytest.raises(TypeError, match="apply_idle: adaptive= was replaced in version 0.2.0: use adaptive_batch=N"):
        ik.apply_idle(tiny(), 0.5, adaptive=True)


def run(*arguments: str, code: int = 0):
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["tune", *arguments])
    assert result.exit_code == code, result.output
    return result


MODEL = ["--model", "test_vit", "--image-size", "64", "--device", "cpu", "--seconds", "0.2"]


def test_the_command_writes_a_schedule_that_apply_idle_takes(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    model = timm.create_model("test_vit", img_size=64).eval()
    target = 0.75 * ik.count_macs(model).total / 1e9
    text = run(*MODEL, "--target-macs", f"{target}", "--batch", "2", "-o", str(path)).stdout
    facts = json.loads(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"]
    assert " ".join(map(str, facts["num_keep"])) in text and facts["environment"]["threads"] == 1
    ik.apply_idle(model, schedule=read_schedule("test", path))
    assert ik.count_macs(model).total == facts["macs"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "exactly one of"),
        (["--target-ms", "3", "--target-speedup", "2"], "exactly one of"),
        (["--target-ms", "-1"], "above 0"),
        (["--target-ms", "3", "--batch", "0"], "at least 1"),
        (["--target-ms", "3", "--threads", "0"], "at least 1"),
        (["--target-ms", "3", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["--target-ms", "3", "--device", "tpu"], "cpu, cuda"),
        (["--target-ms", "3", "-o", "missing/schedule.json"], "missing"),
        (["--target-ms", "3", "--model", "resnet18", "--image-size", "64"], "img_size"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(options: list[str], expected: str) -> None:
    (line,) = run(*MODEL, *options, code=2).stderr.strip().splitlines()  # after the line of the progress bar
    assert line.startswith("idlevit: ") and expected in line


def test_schedule_files(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    for content, ratios in (("[1.0, 0.5]", [1.0, 0.5]), ('{"schedule": [1, 0.25]}', [1.0, 0.25])):
        path.write_text(content)
        assert read_schedule("op", path) == ratios
    bad = {"{": "must be a JSON file", "{}": "JSON list of keep ratios", "[2]": r"in \(0, 1\]", '"0.5"': "JSON list"}
    for content, expected in bad.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=f"^op: .*{expected}"):
            read_schedule("op", path)


def scripted(machine: list[float]) -> tuple[list[list[int]], list[dict[str, Timing]], Callable]:
    """What ``_meet_latency`` measures: a block takes a second for each token, times the machine's next mood."""
    kept_seen: list[list[int]] = []
    given: list[dict[str, Timing]] = []

    def measure(kept: Sequence[int]) -> dict[str, Timing]:
        kept_seen.append(list(kept))
        seconds = sum(kept) * (machine[min(len(given), len(machine) - 1)])
        given.append({"dense": Timing(400, 400, 400, 1), "idle": Timing(seconds, seconds, seconds, 1)})
        return given[-1]

    return kept_seen, given, measure


COUNTS = [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]


def meet(target: Target, machine: list[float]) -> tuple[list[list[int]], list[dict[str, Timing]], list[int], Any]:
    seen, given, measure = scripted(machine)
    kept, timings = tune._meet_latency("tune", target, {k: float(k) for k in COUNTS}, COUNTS, 4, measure)
    return seen, given, kept, timings


def test_a_schedule_is_measured_until_it_meets_the_target_on_average() -> None:
    target = Target("ms", 250_000.0)  # 250 of 400 tokens
    seen, given, kept, timings = meet(target, [1.0])
    assert seen == [[100] * 4, kept, kept, kept] and sum(kept) == 250
    assert timings is given[-1]  # afresh: not one of those that it was chosen by

    # The first measurement of it is a lucky one.
    seen, given, kept, timings = meet(target, [1.0, 1.0, 1.2, 1.1])
    assert seen[1] == seen[2] and sum(seen[3]) < sum(seen[1]) and timings is given[-1]
    assert 1.1 * sum(kept) == pytest.approx(250, rel=0.05)


def test_the_nearest_schedule_is_taken_where_none_meets_the_target() -> None:
    seen, given, kept, timings = meet(Target("ms", 250_000.0), [1.0, 1.1, 1.0, 1.2, 0.9, 1.1, 1.0])
    assert len(given) == 7 and seen[-1] == kept and kept in seen[1:-1] and timings is given[-1]


def test_an_unreachable_speedup_says_what_can_be_reached() -> None:
    with pytest.raises(ValueError, match="target-speedup must be at most 3.08, what the fewest tokens reach, got 9"):
        meet(Target("speedup", 9.0), [1.0])
