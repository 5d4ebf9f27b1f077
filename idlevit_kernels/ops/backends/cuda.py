"""The CUDA C++ kernels of the native extension."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import versions
from ..dtypes import accumulate_dtype
from . import native
from .build_info import build_info


@functools.cache
def _installed() -> tuple[str, ...]:
    found = native.missing()
    if not found and not native.extension().cuda_built:  # type: ignore[union-attr]
        found.append(
            f"the native extension is built without CUDA: {build_info().get('cuda_reason') or 'no build is recorded'}"
        )
    if torch.version.cuda is None:
        found.append(f"this PyTorch ({torch.__version__}) is built without CUDA")
    elif not torch.cuda.is_available():
        found.append("there is no CUDA device that PyTorch can use")
    return tuple(found)


@functools.cache
def _device_reasons(index: int) -> tuple[str, ...]:
    failure = native.extension().cuda_unusable(index)  # type: ignore[union-attr]
    if failure is None:
        return ()
    major, minor = torch.cuda.get_device_capability(index)
    archs = ", ".join(f"sm_{arch}" for arch in build_info().get("cuda_archs", [])) or "unknown architectures"
    return (f"it is built for {archs}, and {torch.cuda.get_device_name(index)} is sm_{major}{minor}: {failure}",)


class CUDABackend(native.NativeBackend):
    name = "cuda"
    device_types = frozenset({"cuda"})

    def installed(self) -> list[str]:
        return list(_installed())

    def architecture_reasons(self, device: torch.device) -> list[str]:
        return list(_device_reasons(device.index))

    @functools.cached_property
    def max_channels(self) -> int:  # type: ignore[override]
        return native.extension().CUDA_MAX_CHANNELS  # type: ignore[union-attr]

    def parameters(self, x: Tensor, *tensors: Tensor | None) -> native.Parameters:
        """The kernels take parameters in the dtype of x or in the accumulate type, so that a model of half type and one
        under autocast need no conversion, which would be a launch."""
        dtypes = {t.dtype for t in tensors if t is not None}
        dtype = x.dtype if dtypes <= {x.dtype} else accumulate_dtype(x.dtype)
        code = native.DTYPES
        return native.parameters((code[x.dtype], code[dtype]), x, dtype, tensors)

    def call(self, kernel: str, x: Tensor, *args: Any) -> str | None:
        device = x.get_device()
        return getattr(native.extension(), "cuda_" + kernel)(*args, device, versions.cuda_stream(device))

    def error(self, op: str, failure: str, indices: Tensor | None, num_tokens: int) -> Exception:
        return RuntimeError(f"{op}: the CUDA kernel could not be launched: {failure}")


CUDA = CUDABackend()
