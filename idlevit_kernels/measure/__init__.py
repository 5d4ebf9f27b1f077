"""What a model costs and how fast it is: multiply-accumulates, timings, benchmarks, schedules for a budget."""

from ..block.timing import Timing, alternate

__all__ = ["Timing", "alternate"]
