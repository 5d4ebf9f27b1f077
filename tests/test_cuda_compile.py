"""Compiles csrc/cuda for every architecture that the build names, and shows what ptxas says of each kernel.

``pytest -s tests/test_cuda_compile.py`` prints the table. No kernel may spill registers or need a stack.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found (CUDACXX, PATH, /usr/local/cuda)"),
]


@dataclasses.dataclass(frozen=True)
class Usage:
    architecture: int
    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


def readable(names: list[str]) -> list[str]:
    """``score_kernel<f16, float, Layout<8, 2, 32>>`` for each mangled name."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shown = []
    for line in plain.splitlines():
        name = line.split("(anonymous namespace)::", 1)[1].split("(", 1)[0]
        name = name.replace("idlevit::cuda::", "").replace("__nv_bfloat16", "bf16").replace("__half", "f16")
        shown.append(name.replace("> >", ">>"))
    return shown


def compile_source(source: Path, folder: Path) -> list[Usage]:
    """One run of nvcc for all architectures, as in the build."""
    command = [
        str(NVCC), "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings",
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES),
        "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        done.stderr,
        re.DOTALL,
    )
    usages = []
    for name, (_, arch, stack, stores, loads, registers, rest) in zip(
        readable([row[0] for row in found]), found, strict=True
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        usages.append(
            Usage(
                int(arch), name, int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)
            )
        )
    return usages


def test_no_kernel_spills(tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        usages = [usage for found in pool.map(lambda s: compile_source(s, tmp_path), SOURCES) for usage in found]
    print(f"\n{'arch':>6} {'registers':>9} {'shared':>6} {'stack':>5} {'spills':>6}  kernel")
    for u in sorted(usages, key=lambda u: (u.kernel, u.architecture)):
        print(f"{u.architecture:>6} {u.registers:>9} {u.shared:>6} {u.stack:>5} {u.spills:>6}  {u.kernel}")
    for arch in ARCHITECTURES:
        here = [u for u in usages if u.architecture == arch]
        assert {u.kernel.split("<")[0] for u in here} >= {
            "score_kernel", "select_kernel", "select_gather_norm_kernel", "gather_kernel", "gather_add_norm_kernel",
            "scatter_kernel",
        }  # fmt: skip
        print(f"sm_{arch}: {len(here)} kernels, at most {max(u.registers for u in here)} registers")
    assert [u for u in usages if u.stack or u.spills] == []
