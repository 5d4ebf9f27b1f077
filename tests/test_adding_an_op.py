"""An op is added to a copy of the tree by the steps of CONTRIBUTING.md, and its generated tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import op_parts
import pytest

from idlevit_kernels import versions

ROOT = Path(__file__).resolve().parents[1]
STEPS = re.findall(
    r"^\d+\. `([^`]+)`",
    (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an op")[2].partition("\n## ")[0],
    re.M,
)
OP = "column_sums"

REFERENCE = """
from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dtypes import accumulate_dtype
from ..record import Tolerance, op


@op(
    kernels=KERNELS,
    differentiable=True,
    tolerance=Tolerance(rows=4),  # thousands of tokens, one after another
    arguments=lambda s: (s.x,),
    bytes_moved=lambda s: s.image + s.B * s.vector,
)
def column_sums(
    x: Tensor,  # [B, T, C]
) -> Tensor:  # [B, C], accumulate type
    return x.to(accumulate_dtype(x.dtype)).sum(1)


@column_sums.fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]), dtype=accumulate_dtype(x.dtype))


@column_sums.setup_context
def _(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (x,) = inputs
    ctx.like = x.shape[1], x.dtype


@column_sums.backward
def _(ctx: Any, grad: Tensor) -> Tensor:
    num_tokens, dtype = ctx.like
    return grad.to(dtype).unsqueeze(1).expand(-1, num_tokens, -1)
"""

PUBLIC = '''

def column_sums(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The sum of all tokens [B, C] of x [B, T, C], in float32 (float64 if x is float64)."""
    check_tensor("column_sums", "x", x, "[B, T, C]", (None, None, None))
    return ops.column_sums.call(x, backend=resolve(backend, "column_sums"))
'''

DECLARATION = """
    // sums[b] = the sum of x[b, t] over t, contiguous [B, C] in the accumulate type.
    Status (*column_sums)(DType dtype, Shape shape, Tokens x, void* sums, int threads);
"""

KERNEL = """
#pragma once

#include "rows.h"

namespace idlevit::cpu::IDLEVIT_ISA {

inline Status column_sums(DType dtype, Shape s, Tokens x, void* sums, int threads) {
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        using A = acc_t<T>;
#pragma omp parallel for schedule(static) num_threads(threads) if (s.B * s.T * s.C >= kSerialElements)
        for (int64_t b = 0; b < s.B; ++b) {
            A buffer[kBuffer<T>];
            A* out = static_cast<A*>(sums) + b * s.C;
            for (int64_t c = 0; c < s.C; ++c) out[c] = 0;
            for (int64_t t = 0; t < s.T; ++t) {
                const A* row = widen(token_row<T>(x, b, t), buffer, s.C);
                for (int64_t c = 0; c < s.C; ++c) out[c] += row[c];
            }
        }
        return Status::ok;
    });
}

}  // namespace idlevit::cpu::IDLEVIT_ISA
"""

BINDING = """int cpu_column_sums(Problem p, Tokens x, void* sums, int threads) {
    require(x.data, all_elements(p.shape), "x");
    return run(idlevit::cpu::kernels().column_sums, p, x, sums, threads);
}

"""

METHOD = """
    def column_sums(self, x: Tensor) -> Tensor:
        x, at_x = native.rows_of(x)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        sums = x.new_empty((B, C), dtype=accumulate_dtype(x.dtype))
        dtype = native.DTYPES[x.dtype]
        failure = self.call("column_sums", x, dtype, B, T, 0, C, at_x, by_image, by_token, sums.data_ptr())
        if failure:
            raise self.error("column_sums", failure, None, T)
        return sums
"""

TRITON = '''
"""column_sums: one program sums a tile of columns."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import accumulate_dtype
from .launch import launch
from .rows import widen


@triton.jit(do_not_specialize=["T"])
def _column_sums(x, sums, T, batch_stride, token_stride, channel_stride, C: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // tiles).to(tl.int64)
    columns = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=sums.dtype.element_ty)
    at = x + image * batch_stride + columns.to(tl.int64) * channel_stride
    for _ in range(T):
        total += widen(tl.load(at, mask=columns < C, other=0.0))
        at += token_stride
    tl.store(sums + image * C + columns, total, mask=columns < C)


def column_sums(x: Tensor) -> Tensor:
    B, T, C = x.shape
    sums = x.new_empty((B, C), dtype=accumulate_dtype(x.dtype))
    programs = B * triton.cdiv(C, 256)
    launch(_column_sums, programs, x.device, x, sums, T, *x.stride(), C=C, BLOCK_C=256)
    return sums
'''


class Copy:
    """A copy of the tree, and which of its files were touched."""

    def __init__(self, root: Path):
        self.root = root
        self.touched: list[str] = []
        for name in ("idlevit_kernels", "csrc", "tests", "bench"):
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, root / name)

    def write(self, name: str, text: str) -> None:
        assert not (self.root / name).exists()
        (self.root / name).write_text(text.lstrip("\n"))
        self.touched.append(name)

    def insert(self, name: str, *places: tuple[str, str]) -> None:
        """Each text after the first match of its pattern."""
        text = (self.root / name).read_text()
        for pattern, added in places:
            match = re.search(pattern, text, re.S)
            assert match is not None, f"{name} has nothing like {pattern}"
            text = text[: match.end()] + added + text[match.end() :]
        (self.root / name).write_text(text)
        self.touched.append(name)

    def add_op(self, kernels: Sequence[str]) -> None:
        declared = "{" + ", ".join(f'"{name}"' for name in kernels) + "}" if kernels else "set()"
        self.write(f"idlevit_kernels/ops/reference/{OP}.py", REFERENCE.replace("KERNELS", declared))
        self.insert(
            "idlevit_kernels/ops/reference/__init__.py",
            (r"from \.cls_direction import cls_direction\n", f"from .{OP} import {OP}\n"),
            (r"__all__ = \[\n", f'    "{OP}",\n'),
        )
        self.insert("idlevit_kernels/ops/functional.py", (r"__all__ = \[\n", f'    "{OP}",\n'), (r"\n\Z", PUBLIC))

    def add_cpu_kernel(self) -> None:
        self.insert("csrc/tokens.h", (r"struct Kernels \{.*?(?=\n\};)", "\n" + DECLARATION.rstrip()))
        self.write(f"csrc/cpu/{OP}.h", KERNEL)
        self.insert(
            "csrc/cpu/kernels.cpp",
            (r"(?=#include \"gather\.h\")", f'#include "{OP}.h"\n'),
            (r"const Kernels IDLEVIT_NAME\(kernels_, IDLEVIT_ISA\) = \{.*?,(?=\s*\};)", f" IDLEVIT_ISA::{OP},"),
        )
        self.insert(
            "csrc/binding.cpp",
            (r"(?=#if defined\(IDLEVIT_WITH_CUDA\))", BINDING),
            (r"PYBIND11_MODULE\(_C, m\) \{\n", f'    m.def("cpu_{OP}", flat<&cpu_{OP}>());\n'),
        )
        self.insert("idlevit_kernels/ops/backends/cpu.py", (r"\n(?=\n    def cls_direction\()", METHOD))

    def add_triton_kernel(self) -> None:
        folder = "idlevit_kernels/ops/backends/triton"
        self.write(f"{folder}/{OP}.py", TRITON)
        self.insert(
            f"{folder}/__init__.py",
            (r"(?=    from \.gather import)", f"    from .{OP} import {OP}\n"),
            (r"for function in \(\n", f"            {OP},\n"),
        )

    def run(self, *command: str, **variables: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.root, env=environment, text=True, timeout=1500,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout

    def passed(self, *files: str, **variables: str) -> int:
        """How many of the files' tests of the op passed; all of them did."""
        text = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", OP, **variables)
        (count,) = re.findall(r"(\d+) passed", text)
        return int(count)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_an_op_with_a_cpu_kernel_touches_at_most_eight_files(copy: Copy) -> None:
    copy.add_op(["cpu"])
    copy.add_cpu_kernel()
    assert sorted(copy.touched) == sorted(step.replace("my_op", OP) for step in STEPS)
    assert len(STEPS) <= 8


@pytest.mark.slow
def test_an_op_without_kernels(copy: Copy) -> None:
    copy.add_op([])
    assert copy.passed("tests/test_records.py", "tests/test_ops.py") >= 50
    pytest.importorskip("mypy")
    copy.run("-m", "mypy", "idlevit_kernels/ops")


@pytest.mark.slow
def test_an_op_with_a_triton_kernel(copy: Copy) -> None:
    pytest.importorskip("triton")
    reason = versions.triton_interpreter_reason()
    if reason is not None:
        pytest.skip(reason)
    copy.add_op(["triton"])
    copy.add_triton_kernel()
    assert copy.passed("tests/test_records.py") == 1
    assert copy.passed("tests/triton_interpreter/test_kernels.py", TRITON_INTERPRET="1") >= 20


@pytest.mark.full
def test_an_op_with_a_cpu_kernel(copy: Copy) -> None:
    for name in ("pybind11", "cmake", "ninja"):
        pytest.importorskip(name)
    copy.add_op(["cpu"])
    copy.add_cpu_kernel()
    copy.run("setup.py", "build_ext", "--inplace", IDLEVIT_CUDA="0")
    assert copy.passed("tests/test_records.py", "tests/test_ops.py") >= 100


def test_a_forgotten_step_is_named(copy: Copy) -> None:
    copy.add_op(["cpu", "triton"])
    with pytest.raises(AssertionError) as error:
        copy.passed("tests/test_records.py")
    assert f"cpu.py or native.py: nothing that runs {OP} on cpu" in str(error.value)
    if op_parts.TRITON:
        assert f"triton/__init__.py: nothing that runs {OP} on triton" in str(error.value)
