from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from idlevit_kernels.backends import cpu

INSTRUCTION_SETS = [] if cpu.installed() else cpu.extension().cpu_instruction_sets()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN or the largest integer, so an output that a kernel leaves out shows."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "fill_uninitialized_memory has no effect"
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(keep_threads: None) -> None:
    """Small problems run faster so, most of all where other processes use the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the CPU kernels that this processor runs."""
    extension = cpu.extension()
    before = extension.cpu_instruction_set()
    extension.cpu_set_instruction_set(request.param)
    yield request.param
    extension.cpu_set_instruction_set(before)
