"""Benchmarks run single calls alternately in rounds; the table groups what belongs side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from idlevit_kernels.info import environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["idlevit"] = environment()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield
