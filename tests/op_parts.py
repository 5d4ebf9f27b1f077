"""What a declared op consists of, and which of it is missing."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import idlevit_kernels as ik
from idlevit_kernels.ops import functional, testing
from idlevit_kernels.ops.backends import Backend, named
from idlevit_kernels.ops.backends.cpu import CPUBackend
from idlevit_kernels.ops.backends.cuda import CUDABackend
from idlevit_kernels.ops.record import RECORDS, Op
from idlevit_kernels.ops.testing import Case

CASE = Case(2, 9, 8, 4)
TRITON = importlib.util.find_spec("triton") is not None  # without it no kernel of it can be looked for


def missing(op: Op[..., Any], root: Path) -> list[str]:
    """Each file, or part of a file, that the op's record promises and that is not there. ``root`` is a checkout."""
    return [*_of_the_record(op), *_of_the_public_function(op), *_of_the_kernels(op, root)]


def _of_the_record(op: Op[..., Any]) -> Iterator[str]:
    file = f"idlevit_kernels/ops/reference/{op.reference.__module__.rpartition('.')[2]}.py"
    if op.fake_function is None:
        yield f"{file}: no @{op.name}.fake"
    if op.differentiable and op.setup_function is None:
        yield f"{file}: no @{op.name}.setup_context, and it is declared differentiable"
    if op.differentiable and op.backward_function is None:
        yield f"{file}: no @{op.name}.backward, and it is declared differentiable"
    if not op.differentiable and (op.backward_function or op.setup_function):
        yield f"{file}: {op.name} has a backward, and is not declared differentiable"
    if op.derivative_of is not None and op.derivative_of not in RECORDS:
        yield f"{file}: no op {op.derivative_of}, whose derivative {op.name} is declared to be"
    unknown = (op.kernels | op.composed) - {"cpu", "cuda", "triton"}
    if unknown or op.kernels & op.composed:
        yield f"{file}: kernels and composed of {op.name} must name cpu, cuda and triton, each at most once"
    if op.bytes_moved(CASE.sizes) <= 0:
        yield f"{file}: bytes_moved of {op.name} must be positive"
    if len(testing.arguments_of(op, CASE)) != len(inspect.signature(op.reference).parameters):
        yield f"{file}: arguments of {op.name} must be as many as its parameters"


def _of_the_public_function(op: Op[..., Any]) -> Iterator[str]:
    if op.derivative_of is not None:
        return
    file = "idlevit_kernels/ops/functional.py"
    function = getattr(functional, op.name, None)
    if function is None:
        yield f"{file}: no function {op.name}"
        return
    parameters = [*inspect.signature(op.reference).parameters, "backend"]
    if list(inspect.signature(function).parameters) != parameters:
        yield f"{file}: parameters of {op.name} must be {', '.join(parameters)}"
    if not (inspect.getdoc(function) or "").strip():
        yield f"{file}: {op.name} has no docstring"
    if getattr(ik, op.name, None) is not function:
        yield f"{file}: {op.name} is not in __all__"


def _of_the_kernels(op: Op[..., Any], root: Path) -> Iterator[str]:
    for name in sorted(op.kernels | op.composed):
        if name == "triton" and not TRITON:
            continue
        if named(name).kernel(op.name) is None:
            yield f"idlevit_kernels/ops/backends/{_ADAPTERS[name]}: nothing that runs {op.name} on {name}"
        elif name in op.kernels:
            yield from _of_triton(op) if name == "triton" else _of_the_extension(op, name, root)
    for name in sorted({"cpu", "cuda", "triton"} - op.kernels - op.composed):
        if named(name).kernel(op.name) is not None:
            yield f"idlevit_kernels/ops/reference: {op.name} runs on {name}, and its record does not say so"


_ADAPTERS = {"cpu": "cpu.py or native.py", "cuda": "cuda.py or native.py", "triton": "triton/__init__.py"}


def _of_triton(op: Op[..., Any]) -> Iterator[str]:
    triton: Backend = named("triton")
    function = triton.kernel(op.name)
    if function is not None and "backends.triton." not in function.__module__:
        yield f"idlevit_kernels/ops/backends/triton/: no kernel of {op.name}; it is a composition"


class _Called(Exception):
    pass


def _native_kernel(op: Op[..., Any], name: str) -> str | None:
    """The kernel of the extension that the adapter calls; None if it calls none."""
    base: Any = {"cpu": CPUBackend, "cuda": CUDABackend}[name]

    class Noting(base):
        def call(self, kernel: str, x: Tensor, *args: object) -> None:
            raise _Called(kernel)

    try:
        Noting().kernel(op.name)(*testing.arguments_of(op, CASE))
    except _Called as called:
        return str(called)
    return None


def _of_the_extension(op: Op[..., Any], name: str, root: Path) -> Iterator[str]:
    kernel = _native_kernel(op, name)
    if kernel is None:
        yield f"idlevit_kernels/ops/backends/{_ADAPTERS[name]}: {op.name} calls no kernel; it is a composition"
        return
    declared, called = rf"\b{kernel}\)?\(", rf"\b{kernel}\b"
    if not re.search(declared, _namespace(root, name)):
        yield f"csrc/tokens.h: no declaration of {kernel} in namespace {name}"
    sources = [path for path in (root / "csrc" / name).iterdir() if path.name not in ("kernels.cpp", "dispatch.cpp")]
    if not any(re.search(rf"\b{kernel}\(", path.read_text()) for path in sources):
        yield f"csrc/{name}/: no definition of {kernel}"
    if name == "cpu" and not re.search(called, (root / "csrc/cpu/kernels.cpp").read_text()):
        yield f"csrc/cpu/kernels.cpp: {kernel} is not in the table"
    if f'm.def("{name}_{kernel}"' not in (root / "csrc/binding.cpp").read_text():
        yield f"csrc/binding.cpp: {name}_{kernel} is not bound"


def _namespace(root: Path, name: str) -> str:
    text = (root / "csrc/tokens.h").read_text()
    return text.partition(f"namespace {name} {{")[2].partition(f"}}  // namespace {name}")[0]
