"""The CUDA kernels without a GPU: csrc/cuda compiled for the host, every thread a fiber, against the float64 reference.

This shows what the kernels and their adapter compute, that 16-byte accesses are aligned, and that threads meet at the
same barriers. It says nothing about speed or about races between blocks, of which there are none to have: no two blocks
write the same memory.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idlevit_kernels.ops import reference
from idlevit_kernels.ops.backends.cuda import CUDABackend
from idlevit_kernels.ops.record import RECORDS
from idlevit_kernels.ops.testing import CASES, DTYPES, Case, check, expected, make_arguments

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# The others are composed of these, or of PyTorch's own ops.
KERNELS = [op.name for op in RECORDS.values() if "cuda" in op.kernels]

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_host") / "kernels.so"
    command = [
        str(CXX), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        # Misaligned vectors, shifts past the width and overflow end the process.
        "-fsanitize=alignment,shift,signed-integer-overflow,bounds", "-fsanitize-undefined-trap-on-error",
        f"-I{ROOT}/tests/cuda_host", f"-I{ROOT}/csrc", f"{ROOT}/tests/cuda_host/kernels.cpp", "-o", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def foreign(library: ctypes.CDLL, function: str, *args: Any, result: Any = None) -> Any:
    call = getattr(library, function)
    call.restype = result
    return call(*(ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a) for a in args))


class EmulatedOps(CUDABackend):
    """The CUDA adapter on CPU tensors."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def call(self, kernel: str, x: Tensor, *args: Any) -> str | None:
        message = foreign(self.library, f"cuda_{kernel}", *args, 1, 64, result=ctypes.c_char_p)
        return None if message is None else message.decode()

    def run(self, op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
        result = getattr(self, op)(*arguments)
        return [arguments[0]] if op.endswith("_") else list(result) if isinstance(result, tuple) else [result]


@pytest.fixture
def ops(library: ctypes.CDLL) -> Iterator[EmulatedOps]:
    yield EmulatedOps(library)
    foreign(library, "emulator_set_descending", 0)


def launches(ops: EmulatedOps) -> int:
    return foreign(ops.library, "emulator_launches", result=ctypes.c_int64)


# One warp a row with 16 and with 32 channels a thread, one block a row; each as wide as it gets, and not quite.
WIDTHS = [
    Case(1, 9, C, 5, dtype=dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for C in (8, 504, 512, 768, 1024, 1280, 4096)
]


@pytest.mark.parametrize("case", CASES + WIDTHS, ids=str)
@pytest.mark.parametrize("op", KERNELS)
def test_against_reference(op: str, case: Case, ops: EmulatedOps) -> None:
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, ops.run(op, arguments), wanted, case.dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("op", KERNELS)
def test_last_thread_first(op: str, case: Case, ops: EmulatedOps) -> None:
    """What one order of the threads hides, a missing barrier say, shows in the other."""
    foreign(ops.library, "emulator_set_descending", 1)
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, ops.run(op, arguments), wanted, case.dtype)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("select_tokens", Case(1, 2048, 8, 700)),  # every key in registers
        ("select_tokens", Case(2, 5003, 8, 1404, scores="ties")),  # more than that
        ("select_tokens", Case(1, 2600, 8, 2600, scores="special", dtype=torch.float64)),
        ("token_scores", Case(1, 16500, 8, 1)),  # several tokens to a warp
        ("token_scores", Case(3, 700, 3, 1)),  # several tokens to a block
        ("select_gather_norm", Case(200, 70, 8, 59)),  # several tokens to a warp
        ("scatter_tokens", Case(1, 1400, 8, 1100)),  # a search of three rounds
    ],
    ids=str,
)
def test_many_tokens(op: str, case: Case, ops: EmulatedOps) -> None:
    arguments = make_arguments(op, case)
    wanted = expected(op, arguments)
    check(op, ops.run(op, arguments), wanted, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["accumulate", "mixed", "none"])
@pytest.mark.parametrize("op", ["token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens"])
def test_parameter_dtypes(op: str, parameters: str, dtype: torch.dtype, ops: EmulatedOps) -> None:
    """A half model under autocast has float32 parameters; a mixture is converted; norms may have no parameters."""
    case = Case(2, 20, 64, 7, dtype=dtype)
    arguments = list(make_arguments(op, case))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.dim() == 1]
    for order, i in enumerate(vectors):
        if parameters == "none":
            arguments[i] = None
        elif parameters == "accumulate" or order == 0:
            arguments[i] = arguments[i].to(wide)
    if op == "token_scores" and parameters == "accumulate":
        arguments[1] = arguments[1].to(wide)
    wanted = expected(op, tuple(arguments))
    check(op, ops.run(op, tuple(arguments)), wanted, dtype)


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("op", ["gather_tokens", "gather_add_norm", "scatter_tokens_", "scatter_add_tokens_"])
def test_a_wrong_index_acts_as_the_nearest_valid_one(op: str, bad: int, ops: EmulatedOps) -> None:
    """In the middle of a larger tensor, whose other rows are neither read nor written."""
    x, indices, *rest = make_arguments(op, Case(1, 9, 8, 3, P=0))
    around = torch.full((3, 9, 8), torch.nan)
    around[1] = x[0]
    inside, indices = around[1:2], torch.tensor([[2, 4, bad]])
    wanted = expected(op, (inside.clone(), indices.clamp(0, 8), *rest))
    check(op, ops.run(op, (inside, indices, *rest)), wanted, torch.float32)
    assert around[0].isnan().all() and around[2].isnan().all()


@pytest.mark.parametrize("wrong", [[5, 5, 5, 5], [8, 0, 5, 2], [-1, 0, 9, 2**40]])
@pytest.mark.parametrize("op", ["scatter_tokens", "scatter_add_tokens", "expand_tokens"])
def test_wrong_indices_read_no_row_past_the_last(op: str, wrong: list[int], ops: EmulatedOps) -> None:
    """What comes out is then a matter of the caller; that all of it is finite shows that nothing else was read."""
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in make_arguments(op, Case(1, 9, 8, 4, P=0))]
    arguments[1] = torch.tensor([wrong])
    for i in (0,) if op == "expand_tokens" else (0, 2):  # followed by NaN in memory
        whole = torch.full((2, *arguments[i].shape[1:]), torch.nan)
        whole[0] = arguments[i][0]
        arguments[i] = whole[:1]
    assert all(t.isfinite().all() for t in ops.run(op, tuple(arguments)))


@pytest.mark.parametrize("op", KERNELS)
def test_launches_once_on_the_stream_and_restores_the_device(op: str, ops: EmulatedOps) -> None:
    before = launches(ops)
    ops.run(op, make_arguments(op, Case(0, 9, 8, 3)))
    assert launches(ops) == before, "there is nothing to do for B = 0"
    ops.run(op, make_arguments(op, Case(2, 9, 8, 3)))
    assert launches(ops) == before + 1
    assert foreign(ops.library, "emulator_stream", result=ctypes.c_uint64) == 64
    assert foreign(ops.library, "emulator_device", result=ctypes.c_int64) == 0


def hard_scores(kind: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(n, dtype=dtype)
    if kind == "ties":
        values = (2 * values).round()
    elif kind == "equal":
        values = torch.full_like(values, -3.5)
    elif kind == "special":
        pool = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38])
        values = pool.to(dtype)[torch.randint(len(pool), (n,))]
    elif kind == "neighbours":  # differ in the last bit
        values = (torch.arange(n) + 0x3F800000).to(torch.int32)[torch.randperm(n)].view(torch.float32).to(dtype)
    return values


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "special", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_have_the_order_of_scores(kind: str, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    scores = hard_scores(kind, 300, dtype)
    bits = 32 if dtype == torch.float32 else 64
    found = ((ctypes.c_uint32 if bits == 32 else ctypes.c_uint64) * len(scores))()
    foreign(library, f"order_keys_f{bits}", scores.data_ptr(), len(scores), ctypes.addressof(found))
    values = scores.tolist()
    for a, key_a in zip(values, found, strict=True):
        assert (key_a == 0) == (a != a)
        for b, key_b in zip(values, found, strict=True):
            if a == a and b == b:
                assert (a < b) == (key_a < key_b)
                assert (a == b) == (key_a == key_b)


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "special", "neighbours"])
@pytest.mark.parametrize("n", [1, 2, 49, 196, 1369])
def test_search_and_compaction(kind: str, n: int, library: ctypes.CDLL) -> None:
    for keep in {1, max(1, n // 3), max(1, int(0.7 * n)), n}:
        scores = hard_scores(kind, n)
        kept = torch.full((keep,), -1)
        steps = foreign(library, "select_f32", scores.data_ptr(), n, keep, kept.data_ptr(), result=ctypes.c_int64)
        assert torch.equal(kept[None], reference.select_tokens(scores[None], keep, 0))
        assert steps <= 32
        if kind == "random" and n == 196 and 1 < keep < n:
            assert steps < 24, "the search ends once the kept keys are separated"
