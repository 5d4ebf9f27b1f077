"""How many tokens each layer keeps (arXiv 2310.05654, section 4: three stages with ratios r, r^2, r^3; or others)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .errors import ArgumentValueError, Words, type_error, value_error


def check_ratio(op: str, ratio: float, argument: str = "keep_ratio") -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise type_error(op, argument, "a number in (0, 1]", ratio)
    if not 0 < ratio <= 1:
        raise value_error(op, argument, "in (0, 1]", ratio)
    return float(ratio)


SHAPES = ("stages", "linear", "constant")


def idle_schedule(
    depth: int,
    keep_ratio: float | None = None,
    *,
    shape: str = "stages",
    end: float | None = None,
    layers: int | None = None,
    macs: float | None = None,
    attention_share: float = 0.0,
) -> list[float]:
    """Keep ratio of each layer. How much is kept is said by one of ``keep_ratio``, ``end`` and ``macs``.

    - "stages", the paper's: the first depth // 4 layers are dense, then three stages of that length keep r, r^2 and
      r^3. Where 4 does not divide the depth, the last stage is longer; below a depth of 4 every stage is one layer.
    - "linear": the ratio falls in equal steps over the first ``layers`` layers, from just below 1 to ``end``, and stays
      there. Idle tokens that follow (``idle="follow"``) like it better than stages.
    - "constant": every layer keeps ``end``.

    Args:
        depth: number of layers, at least 1.
        keep_ratio: r in (0, 1]; the share of image tokens that the first idle stage computes. Of another shape: what
            costs as much as the stages of r do.
        shape: "stages", "linear" or "constant".
        end: of "linear" and "constant", the smallest ratio, in (0, 1].
        layers: of "linear", how many layers the ratio falls over; two thirds of the depth by default.
        macs: the share of the dense layers' multiply-accumulates that the layers shall take, in (0, 1].
        attention_share: the part of a dense layer's multiply-accumulates that grows with the square of the tokens,
            T / (6 C + T) of T tokens and C channels with an MLP of 4 C; 0 by default, when every token costs the same.

    Returns:
        ``depth`` ratios, 1.0 for a dense layer: ``idle_schedule(4, 0.5) == [1.0, 0.5, 0.25, 0.125]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or of no meaning for the shape; or no
            schedule of that shape is as cheap as what was asked for.
    """
    op = "idle_schedule"
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise type_error(op, "depth", "an integer of at least 1", depth)
    if depth < 1:
        raise value_error(op, "depth", "at least 1", depth)
    if shape not in SHAPES:
        raise value_error(op, "shape", f"one of {', '.join(map(repr, SHAPES))}", shape)
    given = {"keep_ratio": keep_ratio, "end": end, "macs": macs}
    named = [name for name, value in given.items() if value is not None]
    if not named:  # the message is about the one that most people give
        check_ratio(op, keep_ratio)  # type: ignore[arg-type]
    if len(named) != 1:
        wanted = "given by one of keep_ratio, end and macs"
        raise value_error(op, "how much is kept", wanted, Words(" and ".join(named)))
    amount = check_ratio(op, given[named[0]], named[0])  # type: ignore[arg-type]
    if end is not None and shape == "stages":
        raise value_error(op, "end", 'None for shape "stages", whose amount is keep_ratio or macs', end)
    if layers is not None and shape != "linear":
        raise value_error(op, "layers", f'None for shape "{shape}"; only "linear" has it', layers)
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= depth):
        raise value_error(op, "layers", f"an integer from 1 to the depth {depth}", layers)
    if not 0 <= attention_share < 1:
        raise value_error(op, "attention_share", "in [0, 1)", attention_share)

    def shaped(ratio: float) -> list[float]:
        return shaped_schedule(depth, shape, ratio, layers)

    def cost(ratios: Sequence[float]) -> float:
        return schedule_cost(ratios, attention_share)

    if end is not None or (keep_ratio is not None and shape == "stages"):
        return shaped(amount)
    target = amount if keep_ratio is None else cost(shaped_schedule(depth, "stages", amount))
    found = cheapest_within(target, shaped, cost)
    if found is None:
        least = (
            f'enough for shape "{shape}", whose layers take {cost(shaped(0.0)):.3f} of a dense model with next'
            " to no tokens at the end (fewer layers= or another shape take less)"
        )
        raise value_error(op, named[0], least, Words(f"{amount:g}, which is {target:.3f} of them"))
    return shaped(found)


def shaped_schedule(depth: int, shape: str, ratio: float, layers: int | None = None) -> list[float]:
    """Of "stages" ``ratio`` is r, of "linear" and "constant" the last layer's."""
    if shape == "stages":
        stage = max(1, depth // 4)
        return [ratio ** min(layer // stage, 3) for layer in range(depth)]
    falling = 1 if shape == "constant" else layers or max(1, round(2 * depth / 3))
    return [1 - (1 - ratio) * min((layer + 1) / falling, 1.0) if ratio < 1 else 1.0 for layer in range(depth)]


def schedule_cost(ratios: Sequence[float], attention_share: float = 0.0) -> float:
    """The share of the dense layers' multiply-accumulates that layers with these ratios take."""
    each = [(1 - attention_share) * ratio + attention_share * ratio * ratio for ratio in ratios]
    return sum(each) / len(each)


def cheapest_within(
    target: float, shaped: Callable[[float], list[float]], cost: Callable[[Sequence[float]], float]
) -> float | None:
    """The amount in (0, 1] whose schedule costs the target, which grows with it; None if every one costs more."""
    low, high = 0.0, 1.0
    if cost(shaped(high)) <= target:
        return high
    if cost(shaped(low)) >= target:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(shaped(middle)) <= target else (low, middle)
    return low or high


def check_schedule(op: str, schedule: Sequence[float], depth: int) -> list[float]:
    """A list of per-layer ratios, one for each of ``depth`` layers."""
    if isinstance(schedule, str) or not isinstance(schedule, Sequence):
        raise type_error(op, "schedule", f"a sequence of {depth} keep ratios", schedule)
    if len(schedule) != depth:
        raise value_error(
            op, "schedule", f"one keep ratio for each of the {depth} layers", Words(f"{len(schedule)} ratios")
        )
    return [check_ratio(op, ratio, f"schedule[{layer}]") for layer, ratio in enumerate(schedule)]


def read_schedule(op: str, path: str | os.PathLike[str]) -> list[float]:
    """The ratios in a JSON file: a list, or an object with one under "schedule", as ``idlevit tune`` writes it."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ArgumentValueError(f"{op}: schedule must be a JSON file, got {path}: {error}") from error
    schedule = content.get("schedule") if isinstance(content, dict) else content
    if not isinstance(schedule, list):
        raise value_error(
            op, "schedule", 'a JSON list of keep ratios, or an object with one under "schedule"', str(path)
        )
    return check_schedule(op, schedule, len(schedule))


def num_kept(keep_ratio: float, num_image_tokens: int) -> int:
    """K = int(keep_ratio * N), at least 1."""
    if keep_ratio == 1:
        return num_image_tokens
    if isinstance(num_image_tokens, torch.SymInt):  # torch.export: ``int`` would fix the image size
        return torch.sym_max(1, torch.sym_int(keep_ratio * num_image_tokens))  # type: ignore[return-value]
    return max(1, int(keep_ratio * num_image_tokens))
