"""A schedule for a budget: as many kept tokens as a latency, a speed-up or a number of multiply-accumulates allows."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..block import IdleBlock
from ..block.latency import evaluation, random_inputs, rotating
from ..block.scoring import Scorer, Select, check_scorer
from ..block.timing import Timing, alternate
from ..errors import Words, type_error, value_error
from ..models import apply_idle, remove_idle
from ..models.apply import find_encoders
from ..models.inputs import block_inputs, default_input_size
from ..schedule import idle_schedule
from .macs import count_macs
from .staircase import steps, token_counts

Progress = Callable[[str, float], None]

_STAIRCASE_SHARE = 0.3  # of the time measures the block
_ROUNDS = 7  # measurements of the whole model: dense, a first schedule, corrections, the result afresh
_CLOSE = 0.015  # to the target, on average of two measurements: no further correction


@dataclasses.dataclass(frozen=True)
class Target:
    """What to meet: ``kind`` is "ms" (of a batch), "speedup" (over the dense timm model) or "macs" (of an image)."""

    kind: str
    value: float


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A schedule and what was measured.

    Attributes:
        schedule: ratio of each layer, for ``apply_idle(model, schedule=...)``.
        num_keep: K of each layer, of ``num_image_tokens``.
        target: what was asked for.
        reached: the same quantity, measured afresh (counted, for "macs") on the whole model.
        deviation: of the latency (of the multiply-accumulates) from what the target allows, as a share of it.
        macs: of one image.
        dense, idle: seconds of a batch.
        staircase: seconds of a block by number of kept tokens.
        steps: the numbers of kept tokens that the schedule is made of.
    """

    schedule: list[float]
    num_keep: list[int]
    num_image_tokens: int
    target: Target
    reached: float
    deviation: float
    macs: int
    dense: Timing
    idle: Timing
    staircase: dict[int, Timing]
    steps: list[int]


def tune_schedule(
    model: nn.Module,
    target: Target,
    batch: int = 1,
    input_size: tuple[int, ...] | None = None,
    scorer: Scorer = "auto",
    select: Select = "top",
    seconds: float = 60.0,
    on_progress: Progress = lambda label, done: None,
) -> Tuned:
    """Finds the schedule with the most kept tokens that meets the target on the device and dtype of the model.

    The block is timed at the token counts that fill tiles. Of the paper's schedules (a dense first quarter, then r, r^2
    and r^3), rounded up to the steps of that staircase, the one with the largest r within the budget is taken; what is
    left of the budget goes to the layers from the first on, a step each. Then the whole model is timed and the budget
    corrected by what that shows, until the mean of two measurements of a schedule meets the target. In the end it is
    measured afresh.

    Args:
        model: a dense model whose blocks all see the same tokens (VisionTransformer, LV-ViT); it is not changed.
        target: see there.
        batch: images in a batch; a schedule is for one batch size, dtype and device.
        input_size: as in ``count_macs``.
        scorer, select: as in ``apply_idle``.
        seconds: to measure for, about.
        on_progress: told what is running and the share of the work that is done.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a target that no schedule of this model meets; the
            message says what the fastest reaches.
    """
    op = "tune"
    if target.kind not in ("ms", "speedup", "macs"):
        raise value_error(op, "target.kind", "ms, speedup or macs", target.kind)
    if isinstance(target.value, bool) or not isinstance(target.value, (int, float)):
        raise type_error(op, f"target-{target.kind}", "a number above 0", target.value)
    if not target.value > 0:
        raise value_error(op, f"target-{target.kind}", "above 0", target.value)
    if batch < 1:
        raise value_error(op, "batch", "at least 1", batch)
    if not seconds > 0:
        raise value_error(op, "seconds", "above 0", seconds)
    found = find_encoders(op, model)
    if len(found) > 1:
        raise value_error(op, "model", "one with one encoder; tune each by itself", Words(f"one with {len(found)}"))
    family, place, blocks = found[0].family, found[0].place, found[0].blocks
    if any(isinstance(block, IdleBlock) for block in blocks):
        raise value_error(op, "model", "dense (call remove_idle first)", "an idle one")
    size = input_size or default_input_size(model)
    like = next(model.parameters())
    inputs = block_inputs(model, blocks, batch, size)
    shapes = sorted({given.shape for given in inputs})
    if len(shapes) != 1:
        raise value_error(op, "model", "one whose blocks all see the same tokens", f"one whose blocks see {shapes}")
    prefix = family.num_prefix_tokens(place)
    num_tokens = shapes[0][1] - prefix
    scorer = check_scorer(op, family.default_scorer(place) if scorer == "auto" else scorer, prefix)
    depth = len(blocks)

    tokens = random_inputs(inputs[depth // 2].shape, like)

    def at(num_keep: int) -> Callable[[], Any]:
        (ratio,) = _ratios([num_keep], num_tokens)
        return inputs[depth // 2].rotating(IdleBlock(blocks[depth // 2], ratio, prefix, scorer, select=select), tokens)

    with evaluation(model):
        measured = alternate(
            {num_keep: at(num_keep) for num_keep in token_counts(num_tokens, prefix)},
            _STAIRCASE_SHARE * seconds,
            device=like.device,
            on_progress=lambda done: on_progress("block", _STAIRCASE_SHARE * done),
        )
    medians = {num_keep: timing.median for num_keep, timing in measured.items()}
    # Multiply-accumulates do not depend on how long anything takes.
    counts = sorted(medians, reverse=True) if target.kind == "macs" else steps(medians)

    idle_model = copy.deepcopy(model).eval()
    images = random_inputs((batch, *size), like)

    def make_idle(num_keep: Sequence[int]) -> nn.Module:
        if any(isinstance(module, IdleBlock) for module in idle_model.modules()):
            remove_idle(idle_model)
        return apply_idle(idle_model, schedule=_ratios(num_keep, num_tokens), scorer=scorer, select=select)

    share = (1 - _STAIRCASE_SHARE) / (2 if target.kind == "macs" else _ROUNDS)
    done = _STAIRCASE_SHARE

    def measure(num_keep: Sequence[int]) -> dict[str, Timing]:
        nonlocal done
        calls = {"dense": rotating(model, images), "idle": rotating(make_idle(num_keep), images)}
        with evaluation(model):
            timings = alternate(
                calls, share * seconds, 3, like.device, lambda part: on_progress("model", done + share * part)
            )
        done += share
        return timings

    if target.kind == "macs":
        # A layer's share of the whole; the embedding and the classifier are the same in all.
        costs = {k: count_macs(make_idle([k] * depth), size).total / depth for k in counts}
        kept = fill(costs, counts, depth, target.value)
        if kept is None:
            least = sum(costs[k] for k in fastest(counts, depth))
            expected = f"at least {least / 1e9:.3f} G, which the fewest tokens need"
            raise value_error(op, "target-macs", expected, Words(f"{target.value / 1e9:.3f} G"))
        timings = measure(kept)
        macs = count_macs(make_idle(kept), size).total
        reached, deviation = float(macs), macs / target.value - 1
    else:
        kept, timings = _meet_latency(op, target, medians, counts, depth, measure)
        reached, deviation = _reached(target, timings)
        macs = count_macs(make_idle(kept), size).total
    return Tuned(
        schedule=_ratios(kept, num_tokens),
        num_keep=kept,
        num_image_tokens=num_tokens,
        target=target,
        reached=reached,
        deviation=deviation,
        macs=macs,
        dense=timings["dense"],
        idle=timings["idle"],
        staircase=measured,
        steps=counts,
    )


def _meet_latency(
    op: str,
    target: Target,
    block_seconds: Mapping[int, float],
    counts: Sequence[int],
    depth: int,
    measure: Callable[[Sequence[int]], dict[str, Timing]],
) -> tuple[list[int], dict[str, Timing]]:
    """The schedule whose measured latency is nearest the target's, and a fresh measurement of it."""
    dense = [max(counts)] * depth
    timings = measure(dense)  # every layer dense, by this package's dense block
    other = max(0.0, timings["idle"].median - depth * block_seconds[max(counts)])
    allowed = _allowed(target, timings)
    if timings["idle"].median <= allowed:
        return dense, timings
    budget = allowed - other
    deviations: dict[tuple[int, ...], list[float]] = {}  # each time that a schedule was measured
    for _ in range(_ROUNDS - 2):
        filled = fill(block_seconds, counts, depth, budget)
        kept = fastest(counts, depth) if filled is None else filled
        reached, deviation = _reached(target, measure(kept))
        if filled is None and deviation > 0.05:
            raise value_error(op, f"target-{target.kind}", _reachable(target, reached), target.value)
        found = deviations.setdefault(tuple(kept), [])
        found.append(deviation)
        off = statistics.mean(found)
        if abs(off) > _CLOSE:
            budget = (other + sum(block_seconds[k] for k in kept)) / (1 + off) - other
        elif len(found) > 1:  # and not by chance
            break
    best = min(deviations, key=lambda tried: abs(statistics.mean(deviations[tried])))
    return list(best), measure(best)


def _allowed(target: Target, timings: Mapping[str, Timing]) -> float:
    return target.value * 1e-3 if target.kind == "ms" else timings["dense"].median / target.value


def _reached(target: Target, timings: Mapping[str, Timing]) -> tuple[float, float]:
    """The quantity of the target, and how far the latency is from what the target allows."""
    idle = timings["idle"].median
    reached = idle * 1e3 if target.kind == "ms" else timings["dense"].median / idle
    return reached, idle / _allowed(target, timings) - 1


def _reachable(target: Target, reached: float) -> str:
    if target.kind == "ms":
        return f"at least {reached:.3g}, what the fewest tokens take"
    return f"at most {reached:.2f}, what the fewest tokens reach"


def fill(costs: Mapping[int, float], counts: Sequence[int], depth: int, budget: float) -> list[int] | None:
    """K of each layer, from ``counts`` (descending), with the costs of all layers within the budget; None if none is.

    Layers follow the paper's schedule for the largest r that fits, rounded up to a count; what is left goes to one
    layer after the other, a count up at a time, none above the layer before it.
    """

    def total(kept: Sequence[int]) -> float:
        return sum(costs[k] for k in kept)

    def at(ratio: float) -> list[int]:
        wanted = (r * counts[0] for r in idle_schedule(depth, ratio))
        return [min(k for k in counts if k >= want - 1e-9) for want in wanted]

    ratios = [i / 1000 for i in range(1000, 0, -1)]
    kept = next((kept for ratio in ratios if total(kept := at(ratio)) <= budget), None)
    if kept is None:
        return None
    raised = True
    while raised:
        raised = False
        for i in range(1, depth):
            if kept[i] >= kept[i - 1]:
                continue
            higher = [*kept[:i], counts[counts.index(kept[i]) - 1], *kept[i + 1 :]]
            if total(higher) <= budget:
                kept, raised = higher, True
    return kept


def fastest(counts: Sequence[int], depth: int) -> list[int]:
    """The schedule with the fewest tokens that ``fill`` can give."""
    return [counts[0] if ratio == 1 else counts[-1] for ratio in idle_schedule(depth, 0.5)]


def _ratios(num_keep: Sequence[int], num_image_tokens: int) -> list[float]:
    """Ratios r with int(r N) = K, away from where rounding could tip that."""
    return [1.0 if k == num_image_tokens else round((k + 0.5) / num_image_tokens, 6) for k in num_keep]
