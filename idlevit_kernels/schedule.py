"""How many tokens each layer keeps (arXiv 2310.05654, section 4: three stages with ratios r, r^2, r^3)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import ArgumentValueError, Words, type_error, value_error


def check_ratio(op: str, ratio: float, argument: str = "keep_ratio") -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise type_error(op, argument, "a number in (0, 1]", ratio)
    if not 0 < ratio <= 1:
        raise value_error(op, argument, "in (0, 1]", ratio)
    return float(ratio)


def idle_schedule(depth: int, keep_ratio: float) -> list[float]:
    """Keep ratio of each layer: the first depth // 4 are dense, then three stages of that length keep r, r^2 and r^3.

    Where 4 does not divide the depth, the last stage is longer; below a depth of 4 every stage is one layer.

    Args:
        depth: number of layers, at least 1.
        keep_ratio: r in (0, 1]; the share of image tokens that the first idle stage computes.

    Returns:
        ``depth`` ratios, 1.0 for a dense layer: ``idle_schedule(4, 0.5) == [1.0, 0.5, 0.25, 0.125]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise type_error("idle_schedule", "depth", "an integer of at least 1", depth)
    if depth < 1:
        raise value_error("idle_schedule", "depth", "at least 1", depth)
    ratio = check_ratio("idle_schedule", keep_ratio)
    stage = max(1, depth // 4)
    return [ratio ** min(layer // stage, 3) for layer in range(depth)]


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
