"""Which backend runs an op: a named one or, for "auto", the first that can.

There are four instances of ``Backend``, one a name.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from ... import env
from ...errors import BackendError, describe, value_error
from .backend import Backend, Kernel
from .cpu import CPU
from .cuda import CUDA
from .reference import REFERENCE

_logger = logging.getLogger("idlevit_kernels")

# The order in which "auto" tries them; "reference" runs everywhere.
BACKENDS = ("triton", "cuda", "cpu", "reference")
_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}


def check_name(backend: str, op: str, argument: str = "backend") -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise value_error(op, argument, f"one of {['auto', *BACKENDS]}", backend)
    return backend


_current: contextvars.ContextVar[str | None] = contextvars.ContextVar("idlevit_backend", default=None)
_FROM_ENVIRONMENT = env.get("IDLEVIT_BACKEND", "auto")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context, ops that are not given a backend use this one. Each thread and task has its own choice.

    Args:
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: the name is none of these. That the backend cannot run a call shows at the call (BackendError).
    """
    token = _current.set(check_name(backend, "use_backend"))
    try:
        yield
    finally:
        _current.reset(token)


def resolve(backend: str, op: str) -> str:
    """The backend a call of the op asks for: its own argument, else that of ``use_backend`` or IDLEVIT_BACKEND."""
    if backend != "auto":
        return check_name(backend, op)
    if torch.compiler.is_dynamo_compiling():  # not every release can trace the next line; the op asks again at its call
        return backend
    chosen = _current.get()
    return check_name(_FROM_ENVIRONMENT, "IDLEVIT_BACKEND", "the name") if chosen is None else chosen


@functools.cache
def named(name: str) -> Backend:
    """The backend of one of the names in BACKENDS."""
    if name == "triton":  # imports the library, which takes a second
        from .triton import TRITON

        return TRITON
    return {backend.name: backend for backend in (CUDA, CPU, REFERENCE)}[name]


_chosen: dict[tuple[Any, ...], Kernel] = {}
_fused: dict[tuple[Any, ...], Kernel | None] = {}


def kernel(op: str, backend: str, args: tuple[Any, ...]) -> Kernel:
    """The function that runs this call of the op. Raises BackendError if a named backend cannot.

    The choice depends on the op, the backend asked for and the first tensor's dtype, device and sizes but for the
    batch, so it is made once for each: at a batch of one, a look at every argument would cost as much as a kernel.
    """
    first = args[0]
    key = (op, backend, first.dtype, first.device, first.shape[1:])
    try:
        return _chosen[key]
    except KeyError:
        found = choose(op, backend, args).kernel(op)
        assert found is not None, f"{op} runs on a backend that has no kernel for it"
        _chosen[key] = found
        return found


def fusion(name: str, op: str, backend: str, args: tuple[Any, ...]) -> Kernel | None:
    """A kernel for a chain of ops, on the backend that would run this call of the op ``op``; None if it has none."""
    first = args[0]
    key = (name, backend, first.dtype, first.device, first.shape[1:])
    try:
        return _fused[key]
    except KeyError:
        found = _fused[key] = choose(op, backend, args).kernel(name)
        return found


def choose(op: str, backend: str, args: tuple[Any, ...]) -> Backend:
    """The backend that runs this call of the op. Raises BackendError if a named backend cannot."""
    if backend != "auto":
        chosen = named(check_name(backend, op))
        reasons = chosen.reasons(op, args)
        if reasons:
            raise BackendError(op, _call(args), {backend: reasons})
        return chosen
    for name in _PREFERENCE.get(args[0].device.type, ("reference",)):
        reasons = named(name).reasons(op, args)
        if not reasons:
            return named(name)
        _log_fallback(op, name, tuple(reasons))
    raise AssertionError("the reference backend runs every call")


def _call(args: tuple[Any, ...]) -> str:
    return ", ".join(describe(a) for a in args)


@functools.cache  # once per op and cause
def _log_fallback(op: str, name: str, reasons: tuple[str, ...]) -> None:
    _logger.warning("%s: backend %r not used: %s", op, name, "; ".join(reasons))
