"""Times calls against each other in one run: round-robin, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

# A sample lasts at least this long, by repeating the call; it keeps a GPU's queue filled and hides the clock's cost.
MIN_SAMPLE_SECONDS = 5e-3


Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20th and 80th percentile of n samples."""

    median: float
    p20: float
    p80: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        if len(samples) == 1:
            return Timing(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), fifths[0], fifths[-1], len(samples))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during ``alternate``; ``timings`` holds what every call has at least one sample of, else it is empty."""

    def __init__(self, timings: dict[Any, Timing]):
        super().__init__()
        self.timings = timings


def alternate(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    min_rounds: int = 5,
    device: torch.device | str = "cpu",
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> dict[Name, Timing]:
    """The ``Timing`` of each call's ``alternated_samples``; arguments and errors are those."""
    return _summary(alternated_samples(calls, seconds, min_rounds, device, on_progress))


def alternated_samples(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    min_rounds: int = 5,
    device: torch.device | str = "cpu",
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> dict[Name, list[float]]:
    """Times every call once a round, in a new order each round, after one round of warm-up: seconds per call.

    Args:
        calls: what to time, by name. Each call should take its input from a small rotating set.
        seconds: how long to go on, to the nearest round, warm-up included.
        min_rounds: rounds to measure even if they take longer than that.
        device: where the work runs. On a GPU each sample is taken between two CUDA events, the queue empty before.
        on_progress: told the share of the work that is done, in [0, 1], after each sample.

    Raises:
        Interrupted: on Ctrl-C, with what has been measured.
    """
    stopwatch = _seconds if torch.device(device).type == "cpu" else _GPUSeconds(device)
    order, shuffle = list(calls), random.Random(0).shuffle
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    begin = time.perf_counter()
    least = len(calls) * (1 + min_rounds)
    done = 0

    def elapsed() -> float:
        return time.perf_counter() - begin

    def timed(name: Name) -> float:
        nonlocal done
        duration = stopwatch(calls[name], repeats[name])
        done += 1
        on_progress(min(done / least, elapsed() / max(seconds, 1e-9), 1.0))
        return duration

    try:
        for name in calls:
            timed(name)
        rounds, round_seconds = 0, 0.0
        while rounds < min_rounds or elapsed() + round_seconds / 2 < seconds:
            round_begin = elapsed()
            shuffle(order)  # no call always runs after the same other one
            for name in order:
                duration = timed(name)
                samples[name].append(duration / repeats[name])
                if duration < MIN_SAMPLE_SECONDS:
                    repeats[name] = math.ceil(repeats[name] * MIN_SAMPLE_SECONDS / max(duration, 1e-7))
            rounds, round_seconds = rounds + 1, elapsed() - round_begin
    except KeyboardInterrupt:
        raise Interrupted(_summary(samples) if all(samples.values()) else {}) from None
    return samples


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


class _GPUSeconds:
    """Seconds between two CUDA events around the calls; what the host takes counts where the GPU waits for it."""

    def __init__(self, device: torch.device | str):
        self.device = device
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self.begin.record()
            for _ in range(repeats):
                call()
            self.end.record()
            self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3


def _summary(samples: Mapping[Name, Sequence[float]]) -> dict[Name, Timing]:
    return {name: Timing.of(values) for name, values in samples.items()}
