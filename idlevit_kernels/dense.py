"""Attention and MLP of a block, on whichever tokens they are given.

They are the block's own modules, called. For float32 inference on a CPU, timm's attentions and MLPs run through
oneDNN's linear instead of the BLAS that ``nn.Linear`` calls: it was a fifth faster than MKL on the AMD EPYC it was
measured on, and applies GELU while a tile of the result is in cache. On Intel's processors MKL is the faster by some
5 to 10% (a third for a few numbers of tokens), so there only the linear with GELU is oneDNN's. Same formula and
weights, no packed copies to go stale.

In training, timm's plain MLP computes GELU again in the backward instead of holding its result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import resolve


@functools.cache
def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    )


@functools.cache
def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file if line.startswith("vendor_id"))
    except OSError:
        return False


def _use_onednn(x: Tensor, backend: str) -> bool:
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and not torch.is_grad_enabled()
        and backend != "reference"
        and not torch.compiler.is_compiling()  # a compiler fuses linear and GELU itself
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn_linear()
    )


def plain_linear(module: Any) -> bool:
    """A Linear with ordinary weights, not quantised or distributed. What a tracer puts in their place will do."""
    return plain(module, "torch.nn.modules.linear", "Linear") and (
        type(module.weight) is nn.Parameter or torch.compiler.is_compiling()
    )


def _inactive(dropout: Any) -> bool:
    return not dropout.training or dropout.p == 0


# A call of oneDNN costs some 20 us more than one of the BLAS; with fewer multiply-accumulates it does not pay.
_MIN_MACS = 2**25


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` through whichever library is faster."""
    return _linear(x, weight, bias) if _use_onednn(x, resolve("auto", "linear")) else F.linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """The linear layer, and GELU of it where ``gelu`` names the approximation ("none" or "tanh")."""
    blas = gelu is None and _is_intel()
    if blas or x.numel() * weight.shape[0] < _MIN_MACS or weight.dtype is not x.dtype:
        y = F.linear(x, weight, bias)
        return y if gelu is None else F.gelu(y, approximate=gelu)
    post: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *post)


def attention(attn: Any, x: Tensor, backend: str, rope: Tensor | None = None) -> Tensor:
    """``attn(x)``, or ``attn(x, rope=rope)``: x [B, n, C] -> [B, n, C]."""
    known = _use_onednn(x, backend) and (
        plain(attn, "timm.layers.attention", "Attention")
        or plain(attn, "timm.models.eva", "EvaAttention")
        or plain(attn, "timm.layers.attention", "AttentionRope")
    )
    if not (
        known
        and attn.qkv is not None
        and plain_linear(attn.qkv)
        and plain_linear(attn.proj)
        and _inactive(attn.attn_drop)
        and _inactive(attn.proj_drop)
        and getattr(attn, "gate", None) is None
    ):
        return attn(x) if rope is None else attn(x, rope=rope)
    qkv, proj = attn.qkv, attn.proj
    weight, bias = qkv.weight, qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:  # of timm's EvaAttention
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    B, n, _ = x.shape
    q, k, v = _linear(x, weight, bias).view(B, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(q, k, rope, attn)
    out = F.scaled_dot_product_attention(q, k, v)
    return _linear(attn.norm(out.transpose(1, 2).flatten(2)), proj.weight, proj.bias)


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
    return torch.is_grad_enabled() and backend != "reference" and not torch.compiler.is_compiling()


def mlp(module: Any, x: Tensor, backend: str) -> Tensor:
    """``module(x)``: x [B, n, C] -> [B, n, C]."""
    onednn, gelu_linear = _use_onednn(x, backend), _use_gelu_linear(backend)
    gated = onednn and plain(module, "timm.layers.mlp", "GluMlp")
    if not (gated or ((onednn or gelu_linear) and plain(module, "timm.layers.mlp", "Mlp"))):
        return module(x)
    fc1, fc2, act = module.fc1, module.fc2, module.act
    if not (plain_linear(fc1) and plain_linear(fc2) and _inactive(module.drop1) and _inactive(module.drop2)):
        return module(x)
    gelu = act.approximate if plain(act, "torch.nn.modules.activation", "GELU") else None
    if onednn:
        hidden = _linear(x, fc1.weight, fc1.bias, None if gated else gelu)
        if gated:
            first, second = hidden.chunk(2, -1)
            hidden = first * act(second) if module.gate_last else act(first) * second
        elif gelu is None:
            hidden = act(hidden)
        return _linear(module.norm(hidden), fc2.weight, fc2.bias)
    if gelu is None or type(module.norm) is not nn.Identity:
        return module(x)
    hidden = fc1(x)
    weight, bias = fc2.weight.to(hidden.dtype), None if fc2.bias is None else fc2.bias.to(hidden.dtype)
    return _GeluLinear.apply(hidden, weight, bias, gelu)
