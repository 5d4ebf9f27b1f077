"""Runs tests/triton_interpreter in a process of its own: Triton decides at its import whether it interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from idlevit_kernels import versions

SUITE = Path(__file__).with_name("triton_interpreter")


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    reason = versions.triton_interpreter_reason()
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
