"""Attention and MLP of a block, on whichever tokens they are given.

They are the block's own modules, called. For float32 inference on a CPU, timm's attentions and MLPs are written out
here, with GELU in place and with the faster library behind the linear layers: MKL, which ``nn.Linear`` calls, on Intel
CPUs, and elsewhere oneDNN, which was a fifth faster on an AMD EPYC (on an Intel Xeon, up to a fifth slower). Same
formula and weights, no packed copies to go stale.

In training, timm's plain MLP computes GELU again in the backward instead of holding its result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .backends import native


def plain(module: nn.Module, home: str, name: str) -> bool:
    """Of exactly the class ``home.name``, and nobody waits to see it called: then it may be replaced by its formula."""
    kind = type(module)
    return (
        kind.__name__ == name
        and kind.__module__ == home
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def _written_out(x: Tensor, backend: str) -> bool:
    """Whether the formulas below stand in for the modules: no gradient needs their intermediate results."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and not torch.is_grad_enabled()
        and backend != "reference"
        and not torch.compiler.is_compiling()  # a compiler fuses linear and GELU itself
        and not torch.is_autocast_enabled("cpu")
        and not _has_any_global_hook()
    )


def plain_linear(module: Any) -> bool:
    """A Linear with ordinary weights, not quantised or distributed. What a tracer puts in their place will do."""
    return plain(module, "torch.nn.modules.linear", "Linear") and (
        type(module.weight) is nn.Parameter or torch.compiler.is_compiling()
    )


def inactive(dropout: Any) -> bool:
    """Returns its input, and nobody waits to see it called: timm's attention maps come from hooks on a dropout."""
    if plain(dropout, "torch.nn.modules.dropout", "Dropout"):
        return not dropout.training or dropout.p == 0
    return plain(dropout, "torch.nn.modules.linear", "Identity")


@functools.cache
def _onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    extension = native.extension()
    return not (torch.backends.mkl.is_available() and getattr(extension, "cpu_is_intel", False))


# A call of oneDNN costs some 20 us more than one of the BLAS; with fewer multiply-accumulates it does not pay.
_MIN_MACS = 2**25


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot trace all that follows
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and x.numel() * weight.shape[0] >= _MIN_MACS
        and _onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` through whichever library is faster."""
    if _use_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias), approximate=approximate)`` where no gradient is recorded."""
    if _use_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "gelu", [], approximate)
    return torch.ops.aten.gelu_.default(F.linear(x, weight, bias), approximate=approximate)


def attention(attn: Any, x: Tensor, backend: str, rope: Tensor | None = None) -> Tensor:
    """``attn(x)``, or ``attn(x, rope=rope)``: x [B, n, C] -> [B, n, C]."""
    known = _written_out(x, backend) and (
        plain(attn, "timm.layers.attention", "Attention")
        or plain(attn, "timm.models.eva", "EvaAttention")
        or plain(attn, "timm.layers.attention", "AttentionRope")
    )
    if not (
        known
        and attn.qkv is not None
        and plain_linear(attn.qkv)
        and plain_linear(attn.proj)
        and inactive(attn.attn_drop)
        and inactive(attn.proj_drop)
        and getattr(attn, "gate", None) is None
    ):
        return attn(x) if rope is None else attn(x, rope=rope)
    qkv, proj = attn.qkv, attn.proj
    weight, bias = qkv.weight, qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:  # of timm's EvaAttention
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    B, n, _ = x.shape
    q, k, v = linear(x, weight, bias).view(B, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(q, k, rope, attn)
    out = F.scaled_dot_product_attention(q, k, v)
    return linear(attn.norm(out.transpose(1, 2).flatten(2)), proj.weight, proj.bias)


def _rotated(q: Tensor, k: Tensor, rope: Tensor, attn: Any) -> list[Tensor]:
    """Queries and keys [B, H, n, head_dim], float32, with each pair (a, b) of channels of an image token turned.

    It becomes (a cos - b sin, b cos + a sin), as timm's ``apply_rot_embed_cat`` has it: one complex product where the
    channels of a pair lie side by side. rope: [..., n - P, 2 * head_dim], sines before cosines.
    """
    sin, cos = (t.chunk(2, -1)[0] if attn.rotate_half else t[..., ::2] for t in rope.chunk(2, -1))
    prefix = (0, 0, attn.num_prefix_tokens, 0)
    cos, sin = F.pad(cos, prefix, value=1.0), F.pad(sin, prefix)
    if attn.rotate_half:
        halves = (t.chunk(2, -1) for t in (q, k))
        return [
            torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1) for a, b in halves
        ]
    turn = torch.complex(cos, sin)
    return [torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k)]


class _GeluLinear(torch.autograd.Function):
    """``F.linear(F.gelu(x), weight, bias)`` that keeps x alone for the backward, where it computes GELU again.

    The hidden layer of an MLP is four times as wide as its input: half of what training a block holds.
    """

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
        rows = grad.flatten(0, -2)
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x, approximate=ctx.approximate) if of_x else None
        grad_weight = rows.mT @ F.gelu(x, approximate=ctx.approximate).flatten(0, -2) if of_weight else None
        return grad_x, grad_weight, rows.sum(0) if of_bias else None, None


def _use_gelu_linear(backend: str) -> bool:
    # A compiler decides by itself what to compute again.
    return (
        torch.is_grad_enabled()
        and backend != "reference"
        and not torch.compiler.is_compiling()
        and not _has_any_global_hook()
    )


def mlp(module: Any, x: Tensor, backend: str) -> Tensor:
    """``module(x)``: x [B, n, C] -> [B, n, C]."""
    written_out, gelu_linear = _written_out(x, backend), _use_gelu_linear(backend)
    gated = written_out and plain(module, "timm.layers.mlp", "GluMlp")
    if not (gated or ((written_out or gelu_linear) and plain(module, "timm.layers.mlp", "Mlp"))):
        return module(x)
    fc1, fc2, act = module.fc1, module.fc2, module.act
    if not (plain_linear(fc1) and plain_linear(fc2) and inactive(module.drop1) and inactive(module.drop2)):
        return module(x)
    gelu = act.approximate if plain(act, "torch.nn.modules.activation", "GELU") else None
    if written_out:
        if gated:
            first, second = linear(x, fc1.weight, fc1.bias).chunk(2, -1)
            hidden = first * act(second) if module.gate_last else act(first) * second
        elif gelu is not None:
            hidden = linear_gelu(x, fc1.weight, fc1.bias, gelu)
        else:
            hidden = act(linear(x, fc1.weight, fc1.bias))
        return linear(module.norm(hidden), fc2.weight, fc2.bias)
    if gelu is None or not plain(module.norm, "torch.nn.modules.linear", "Identity"):
        return module(x)
    hidden = fc1(x)
    weight, bias = fc2.weight.to(hidden.dtype), None if fc2.bias is None else fc2.bias.to(hidden.dtype)
    return _GeluLinear.apply(hidden, weight, bias, gelu)
