"""Attention and MLP of a block, on whichever tokens they are given.

They are the block's own modules, called. For float32 inference on a CPU, timm's plain attention and MLP run through
oneDNN's linear instead of the BLAS that ``nn.Linear`` calls: it was a fifth faster than MKL on the AMD EPYC it was
measured on, and applies GELU while a tile of the result is in cache. Same formula and weights, no packed copies to go
stale.
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
    if x.numel() * weight.shape[0] < _MIN_MACS or weight.dtype is not x.dtype:
        y = F.linear(x, weight, bias)
        return y if gelu is None else F.gelu(y, approximate=gelu)
    post: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *post)


def attention(attn: Any, x: Tensor, backend: str, rope: Tensor | None = None) -> Tensor:
    """``attn(x)`` or ``attn(x, rope=rope)``: x [B, n, C] -> [B, n, C]."""
    if rope is not None:
        return attn(x, rope=rope)
    if not (_use_onednn(x, backend) and plain(attn, "timm.layers.attention", "Attention")):
        return attn(x)
    qkv, proj = attn.qkv, attn.proj
    if not (
        plain_linear(qkv)
        and plain_linear(proj)
        and _inactive(attn.attn_drop)
        and _inactive(attn.proj_drop)
        and getattr(attn, "gate", None) is None
    ):
        return attn(x)
    B, n, _ = x.shape
    q, k, v = (
        _linear(x, qkv.weight, qkv.bias).view(B, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    )
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    return _linear(attn.norm(out.transpose(1, 2).flatten(2)), proj.weight, proj.bias)


def mlp(module: Any, x: Tensor, backend: str) -> Tensor:
    """``module(x)``: x [B, n, C] -> [B, n, C]."""
    if not (_use_onednn(x, backend) and plain(module, "timm.layers.mlp", "Mlp")):
        return module(x)
    fc1, fc2, act = module.fc1, module.fc2, module.act
    if not (plain_linear(fc1) and plain_linear(fc2) and _inactive(module.drop1) and _inactive(module.drop2)):
        return module(x)
    if plain(act, "torch.nn.modules.activation", "GELU"):
        hidden = _linear(x, fc1.weight, fc1.bias, act.approximate)
    else:
        hidden = act(_linear(x, fc1.weight, fc1.bias))
    return _linear(module.norm(hidden), fc2.weight, fc2.bias)
