"""The Triton kernels: one launch an op, on NVIDIA GPUs from compute capability 8.0, or interpreted on the CPU.

One file a kernel family holds the kernels and the functions that allocate their outputs and launch them. Kernels keep
whole rows of C channels in registers, so each row is read once. With TRITON_INTERPRET=1 in the environment Triton
runs them in Python, on tensors of any device: slow, and meant for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .... import versions
from ...reference import cls_direction
from ..backend import Backend, Kernel

_kernels: dict[str, Kernel] = {}
try:
    from triton import JITFunction

    from .gather import gather_add_norm, gather_tokens
    from .norm_backward import gather_norm_backward
    from .rows import widen
    from .scatter import expand_tokens, scatter_add_tokens, scatter_add_tokens_, scatter_tokens, scatter_tokens_
    from .score import token_scores
    from .select import MAX_TOKENS, select_gather_norm, select_tokens
    from .token_cut_loss import token_cut_loss, token_cut_loss_backward
except ImportError as error:
    _import_error: str | None = f"Triton cannot be imported: {error}"
else:
    _import_error = None
    _kernels |= {
        function.__name__: function
        for function in (
            cls_direction.reference,  # two small matrix products: PyTorch's library has those
            expand_tokens,
            gather_add_norm,
            gather_norm_backward,
            gather_tokens,
            scatter_add_tokens,
            scatter_add_tokens_,
            scatter_tokens,
            scatter_tokens_,
            select_gather_norm,
            select_tokens,
            token_cut_loss,
            token_cut_loss_backward,
            token_scores,
        )
    }

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_CHANNELS = 4096
# All other kernels hold whole rows.
_ANY_WIDTH = ("cls_direction", "select_tokens", "token_cut_loss", "token_cut_loss_backward")


@functools.cache
def _installed() -> tuple[str, ...]:
    if _import_error:
        return (_import_error,)
    if interpreted():
        reason = versions.triton_interpreter_reason()
        return (reason,) if reason else ()
    if not torch.cuda.is_available():
        return ("PyTorch finds no CUDA GPU, and Triton's interpreter is off (TRITON_INTERPRET=1, before the import)",)
    return ()


@functools.cache
def interpreted() -> bool:
    """Whether Triton's decorator made interpreted functions of the kernels; it decides that when they are imported."""
    return _import_error is None and not isinstance(widen, JITFunction)


@functools.cache
def _capability_reasons(device: torch.device) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    return (f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}",) if major < 8 else ()


def type_reasons(op: str, dtypes: Collection[torch.dtype]) -> list[str]:
    """Why Triton itself cannot build the op's kernel for tensors of these types, on whatever device."""
    if not op.startswith("token_cut_loss"):
        return []
    if interpreted():
        return ["Triton's interpreter has no product of bfloat16 matrices"] if torch.bfloat16 in dtypes else []
    if op == "token_cut_loss_backward" and torch.float64 in dtypes:
        return ["Triton compiles its product of computed float64 matrices for few GPUs: neither for 8.0 nor for 9.0"]
    return []


class TritonBackend(Backend):
    name = "triton"
    device_types = frozenset({"cuda"})  # interpreted: any

    def installed(self) -> list[str]:
        return list(_installed())

    def kernel(self, op: str) -> Kernel | None:
        return _kernels.get(op)

    def reasons(self, op: str, args: tuple[Any, ...]) -> list[str]:
        found = self.installed()
        if not _import_error:
            found += self.kernel_reasons(op)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not interpreted():
            found += self.device_reasons(args)
            for device in {t.device for t in tensors if t.is_cuda}:
                found += _capability_reasons(device)
        first = tensors[0]
        dtypes = {t.dtype for t in tensors}
        found += type_reasons(op, dtypes)
        if first.dtype not in _DTYPES:
            found.append(f"it knows float32, float64, float16 and bfloat16, not {first.dtype}")
        if first.dim() == 3 and op not in _ANY_WIDTH and first.shape[2] > _MAX_CHANNELS:
            found.append(f"it takes at most {_MAX_CHANNELS} channels, not {first.shape[2]}")
        if op.startswith("select") and not _import_error:
            num_tokens = first.shape[1]  # of scores [B, T] or tokens [B, T, C]
            if num_tokens > MAX_TOKENS:
                found.append(f"it selects among at most {MAX_TOKENS} tokens, not {num_tokens}")
        return found


TRITON = TritonBackend()
