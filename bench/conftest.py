"""A benchmark here measures all forms of one thing in alternation, then shows each as a row of pytest-benchmark's.

pytest-benchmark measures one test after the other, so on a machine that does anything else its rows do not compare.
Here the first test of a group times the forms of the whole group in turns (``block/timing.py``); each test then replays
its own samples to pytest-benchmark, on a clock that only these samples move, for its table and its JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from idlevit_kernels.block.timing import Timing
from idlevit_kernels.measure.info import device_name, environment

_now = 0.0
_environment = functools.cache(environment)


def replayed_clock() -> float:
    """Seconds of samples that have been replayed."""
    return _now


def pytest_configure(config: pytest.Config) -> None:
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]


@pytest.hookimpl(tryfirst=True)  # before pytest drops what -m does not select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.benchmark(timer=replayed_clock))
            if config.option.markexpr == "full":  # everything, not the long ones alone
                item.add_marker(pytest.mark.full)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # a host's name and every flag of its processor
    machine_info |= _environment()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {"id": _environment()["commit"]}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # thousands of samples; the statistics stay


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def replay(benchmark: Any) -> Callable[..., Timing]:
    """``replay(samples, device, **facts)``: makes the test's row from seconds per call, with the facts beside it."""

    def replay(samples: Sequence[float], device: torch.device, **facts: Any) -> Timing:
        remaining = iter(samples)

        def advance() -> None:
            global _now
            _now += next(remaining)

        benchmark.pedantic(advance, rounds=len(samples))
        timing = Timing.of(samples)
        shown = ("commit", "version", "torch", "timm", "triton", "threads")
        benchmark.extra_info |= {key: _environment()[key] for key in shown}
        benchmark.extra_info |= {"device": device_name(device), "p20": timing.p20, "p80": timing.p80, **facts}
        return timing

    return replay
