"""The native CPU kernels."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import env
from ...errors import value_error
from .. import reference
from ..dtypes import accumulate_dtype
from . import native
from .reference import bad_indices


@functools.cache
def extension() -> ModuleType | None:
    """The extension with the instruction set that IDLEVIT_CPU_ISA names; None if it is not built."""
    found, name = native.extension(), env.get("IDLEVIT_CPU_ISA", "")
    if found is not None and name:
        if name not in found.cpu_instruction_sets():
            raise value_error("IDLEVIT_CPU_ISA", "the name", f"one of {found.cpu_instruction_sets()}", name)
        found.cpu_set_instruction_set(name)
    return found


_MAX_DIRECTIONS = 64
_TYPES = {dtype: ((code,), accumulate_dtype(dtype)) for dtype, code in native.DTYPES.items()}


def optional_address(t: Tensor | None) -> int:
    """0 for one that is left out."""
    return 0 if t is None else native.address(t)


class CPUBackend(native.NativeBackend):
    name = "cpu"
    device_types = frozenset({"cpu"})
    fusions = frozenset({"cls_select_gather_norm"})
    row_ops = native.NativeBackend.row_ops | {"cls_direction", "scatter_add_tokens", "scatter_add_tokens_"}

    def installed(self) -> list[str]:
        return native.missing()

    @functools.cached_property
    def max_channels(self) -> int:  # type: ignore[override]
        return extension().MAX_CHANNELS  # type: ignore[union-attr]

    def parameters(self, x: Tensor, *tensors: Tensor | None) -> native.Parameters:
        """The kernels take parameters in the accumulate type."""
        codes, dtype = _TYPES[x.dtype]
        return native.parameters(codes, x, dtype, tensors)

    def call(self, kernel: str, x: Tensor, *args: Any) -> int:
        return self.kernels[kernel](*args, torch.get_num_threads())

    @functools.cached_property
    def kernels(self) -> dict[str, Any]:
        return {name.removeprefix("cpu_"): value for name, value in vars(extension()).items() if name[:4] == "cpu_"}

    def cls_direction(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
    ) -> Tensor:
        if not self._reads(x, qkv_weight, qkv_bias):
            return reference.cls_direction.reference(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias)
        (dtype,), (*at_norm, at_weight), _owners = self.parameters(x, norm_weight, norm_bias, qkv_weight)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        width = qkv_weight.shape[0] // 3
        query, direction = x.new_empty((B, width)), x.new_empty((B, C))
        failure = self.call(
            "cls_direction", x, dtype, B, T, 0, C, native.address(x), by_image, by_token, *at_norm, eps, at_weight,
            optional_address(qkv_bias), width, query.data_ptr(), direction.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("cls_direction", failure, None, T)
        return direction

    def _reads(self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None) -> bool:
        """Whether the kernel that computes directions takes these. It reads the weights once for a few images; from
        some number of images on, a matrix product is better."""
        return (
            x.shape[0] <= _MAX_DIRECTIONS
            and (x.dtype is torch.float32 or x.dtype is torch.float64)
            and qkv_weight.dtype is x.dtype
            and (qkv_bias is None or (qkv_bias.dtype is x.dtype and qkv_bias.is_contiguous()))
            and x.stride(2) == 1
        )

    def cls_select_gather_norm(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        norm = (norm_weight, norm_bias, eps)
        if not self._reads(x, qkv_weight, qkv_bias):
            scores = self.token_scores(x, self.cls_direction(x, *norm, qkv_weight, qkv_bias), *norm)
            return self.select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm)
        (dtype,), (*at_norm, at_weight), _owners = self.parameters(x, norm_weight, norm_bias, qkv_weight)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        n, width = num_prefix_tokens + num_keep, qkv_weight.shape[0] // 3
        workspace = x.new_empty(B * (width + C + T))
        indices, normed = x.new_empty((B, n), dtype=torch.int64), x.new_empty((B, n, C))
        failure = self.call(
            "cls_select_gather_norm", x, dtype, B, T, n, C, num_prefix_tokens, native.address(x), by_image, by_token,
            *at_norm, eps, at_weight, optional_address(qkv_bias), width, workspace.data_ptr(),
            indices.data_ptr(), normed.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("cls_select_gather_norm", failure, None, T)
        return indices, normed

    def error(self, op: str, failure: int, indices: Tensor | None, num_tokens: int) -> Exception:
        if failure == 1 and indices is not None:
            return bad_indices(op, indices, num_tokens)
        return RuntimeError(f"{op}: the native kernel refused the call with status {failure}")


CPU = CPUBackend()
