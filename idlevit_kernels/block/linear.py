"""Linear layers by whichever library is faster, and GELU within them.

For float32 inference on a CPU that is MKL, which ``nn.Linear`` calls, on Intel CPUs, and elsewhere oneDNN, which was a
fifth faster on an AMD EPYC (on an Intel Xeon, up to a fifth slower). Same formula and weights, no packed copies to go
stale. In training, an MLP's GELU is computed again in the backward instead of being held.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from .. import versions
from ..ops import library as ops
from ..ops.backends import native


@dataclasses.dataclass(eq=False)
class Linear:
    """A projection of the last axis.

    Attributes:
        module: what computes it.
        weight, bias: [out, in], [out] or None; the weight is None if the module's formula is not known.
        plain: whether they stand in for the module, which nobody watches.
        onednn: whether oneDNN may compute it, where a call is one for it; ``onednn_is_faster()``.
    """

    module: Any
    weight: Tensor | None
    bias: Tensor | None
    plain: bool
    onednn: bool = False

    def read(self) -> Linear:
        """The same, by its parameters if they can be read, whoever watches the module."""
        return Linear(self.module, self.weight, self.bias, self.weight is not None)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not self.plain or weight is None:
            return self.module(x)
        if self.onednn and _use_onednn(x, weight):
            return versions.onednn_linear(x, weight, self.bias)
        return F.linear(x, weight, self.bias)


def onednn_is_faster() -> bool:
    """On this machine, in eager mode: a compiler cannot trace the call."""
    return not is_compiling() and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    if versions.onednn_reason():
        return False
    return not (torch.backends.mkl.is_available() and getattr(native.extension(), "cpu_is_intel", False))


# A call of oneDNN costs some 20 us more than one of the BLAS; with fewer multiply-accumulates it does not pay.
_MIN_MACS = 2**25


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] >= _MIN_MACS
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not ops.transformed()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` through whichever library is faster."""
    return Linear(None, weight, bias, True, onednn_is_faster())(x)


def linear_gelu(x: Tensor, layer: Linear, approximate: str) -> Tensor:
    """``F.gelu(layer(x), approximate=approximate)`` of a plain layer."""
    weight = layer.weight
    assert weight is not None
    if layer.onednn and _use_onednn(x, weight):
        return versions.onednn_linear(x, weight, layer.bias, approximate)
    hidden = F.linear(x, weight, layer.bias)
    if not torch.is_grad_enabled():  # nobody else holds it
        return torch.ops.aten.gelu_.default(hidden, approximate=approximate)
    return F.gelu(hidden, approximate=approximate)


class _GeluLinear(torch.autograd.Function):
    """``F.linear(F.gelu(x), weight, bias)`` that keeps x alone for the backward, where it computes GELU again.

    The hidden layer of an MLP is four times as wide as its input: half of what training a block holds.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.approximate = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # flatten has no rule for batched gradients
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x, approximate=ctx.approximate) if of_x else None
        hidden = F.gelu(x, approximate=ctx.approximate).reshape(-1, x.shape[-1]) if of_weight else None
        grad_weight = None if hidden is None else rows.mT @ hidden
        return grad_x, grad_weight, rows.sum(0) if of_bias else None, None


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``F.linear(F.gelu(x), weight, bias)`` while gradients are recorded, holding x alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.get_autocast_dtype(device):
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)  # the product has another type than x
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return _GeluLinear.apply(x, weight, bias, approximate)


def recompute_gelu() -> bool:
    """Whether ``gelu_linear`` is to be called. A compiler decides by itself what to compute again."""
    return torch.is_grad_enabled() and not is_compiling() and not ops.transformed()
