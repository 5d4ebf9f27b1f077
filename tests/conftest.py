from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from idlevit_kernels.ops.backends import CPU, cpu


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m gpu`` reads tests/gpu alone: those files need torch, Triton, timm and pytest, and many others need more."""
    elsewhere = collection_path.is_file() and collection_path.parent.name != "gpu"
    return True if elsewhere and config.getoption("markexpr").startswith("gpu") else None


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


@pytest.fixture
def instruction_sets() -> Iterator[Iterator[str]]:
    """Every instruction set of the CPU kernels that this processor runs, in use while it is the current item."""
    extension = cpu.extension()
    assert extension is not None, CPU.installed()
    before = extension.cpu_instruction_set()

    def each() -> Iterator[str]:
        for name in extension.cpu_instruction_sets():
            extension.cpu_set_instruction_set(name)
            assert extension.cpu_instruction_set() == name
            yield name

    yield each()
    extension.cpu_set_instruction_set(before)
