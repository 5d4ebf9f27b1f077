"""A pytest plugin (``-p gpu_test_rows``): prints a line of JSON for each test as it ends, under pytest-xdist too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Of this process, which runs tests. With pytest-xdist it is not the one that prints.
_counts = {"hits": 0, "misses": 0}


def _note(*, cache_hit: bool, **_: Any) -> None:
    _counts["hits" if cache_hit else "misses"] += 1


def pytest_configure(config: pytest.Config) -> None:
    try:
        import triton

        triton.knobs.compilation.listener = _note
    except (ImportError, AttributeError):  # no Triton, or one whose compiler tells nobody
        pass


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = dict(_counts)
    try:
        return (yield)
    finally:
        item.user_properties.append(("triton", {k: v - before[k] for k, v in _counts.items()}))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    row |= dict(report.user_properties).get("triton", {})
    if report.failed:
        row["message"] = report.longreprtext[-2000:]
    print("\n" + json.dumps(row), file=sys.__stdout__, flush=True)
