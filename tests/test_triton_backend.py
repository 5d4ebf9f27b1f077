"""The Triton backend where neither a GPU nor the interpreter is at hand: it says why it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import idlevit_kernels as ik
from idlevit_kernels.ops import testing

SMALL = testing.Case(2, 9, 6, 4, P=2)


@pytest.mark.parametrize("op", testing.OPS)
def test_cpu_tensors_need_the_interpreter(op: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    with pytest.raises(ik.BackendError, match=f"{op}: no usable backend") as raised:
        testing.run(op, testing.make_arguments(op, SMALL), "triton")
    reasons = raised.value.reasons["triton"]
    assert any("it runs on CUDA tensors, and one is on cpu" in reason for reason in reasons)
    if not torch.cuda.is_available():
        assert len(reasons) == 2


def test_without_triton_there_is_a_reason_and_no_import_error() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, idlevit_kernels as ik\n"
        "scores = torch.randn(2, 9)\n"
        "assert ik.select_tokens(scores, 3).shape == (2, 4)\n"
        "try:\n"
        "    ik.select_tokens(scores, 3, backend='triton')\n"
        "except ik.BackendError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported" in done.stdout
