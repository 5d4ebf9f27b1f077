"""The idle block in inference, for timm's own Block where nothing watches or replaces a part of it.

``block.py`` has the formula; this is the same chain of ops with everything that it reads looked up beforehand. At batch
1 a layer's weights push all else out of the processor's caches, so each line of Python between two matrix products
costs microseconds: at 67 of 196 tokens of DeiT-S that was a tenth of the block.
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .backends import kernel
from .dense import inactive, linear, linear_gelu, plain, plain_linear
from .functional import check_writable
from .scoring import layer_norm_parameters

_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def run(
    x: Tensor, block: Any, num_keep: Any, num_prefix_tokens: Any, scorer: str, inplace: bool, backend: str
) -> tuple[Tensor, Tensor | None] | None:
    """The block's output and the indices (None if no token idles); None where ``block.py`` has to take the call,
    be it to compute it or to refuse it."""
    if backend == "reference" or not ops.direct(x):
        return None
    plan = _plans.get(block)
    if plan is None or not plan.holds():
        plan = Plan.of(block)
        if plan is None:
            _plans.pop(block, None)
            return None
        _plans[block] = plan
    if (
        x.dim() != 3
        or x.dtype is not plan.dtype
        or x.device != plan.device
        or x.shape[2] != plan.channels
        or type(num_keep) is not int
        or type(num_prefix_tokens) is not int
        or not 1 <= num_prefix_tokens <= x.shape[1] - num_keep
        or num_keep < 1
        or scorer not in ("auto", "cls")
        or _has_any_global_hook()
    ):
        return None
    if inplace:
        check_writable("idle_block", x)
    if num_prefix_tokens + num_keep == x.shape[1]:
        out = plan.dense(x)
        return (x.copy_(out) if inplace else out), None
    return plan.idle(x, num_keep, num_prefix_tokens, inplace, backend)


class Plan:
    """What a block's forward pass reads, and what has to stay as it is for that to remain true."""

    @staticmethod
    def of(block: Any) -> Plan | None:
        """None unless the block is timm's, with the parts that ``attend`` and ``mlp`` know."""
        from .block import IdleBlock

        kind = type(block._block[0]) if isinstance(block, IdleBlock) else type(block)
        if (kind.__module__, kind.__name__) != ("timm.models.vision_transformer", "Block"):
            return None
        attn, mlp = block.attn, block.mlp
        if not (
            plain(attn, "timm.layers.attention", "Attention")
            and plain(mlp, "timm.layers.mlp", "Mlp")
            and plain(mlp.act, "torch.nn.modules.activation", "GELU")
            and all(plain_linear(layer) for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            and all(inactive(drop) for drop in (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2))
            and all(type(part) is nn.Identity for part in (attn.q_norm, attn.k_norm, attn.norm, mlp.norm))
            and getattr(attn, "gate", None) is None
        ):
            return None
        norms = layer_norm_parameters(block.norm1), layer_norm_parameters(block.norm2)
        scales = [None if type(ls) is nn.Identity else ls for ls in (block.ls1, block.ls2)]
        drops = (block.drop_path1, block.drop_path2)
        if (
            None in norms
            # A norm of another type than its tokens is for the fused kernels or the module, not for F.layer_norm.
            or any(norm[0] is not None and norm[0].dtype is not attn.qkv.weight.dtype for norm in norms if norm)
            or any(ls is not None and not plain(ls, "timm.layers.layer_scale", "LayerScale") for ls in scales)
            or any(
                type(drop) is not nn.Identity and (drop.training or not plain(drop, "timm.layers.drop", "DropPath"))
                for drop in drops
            )
        ):
            return None
        plan = Plan(block, norms, [None if ls is None else ls.gamma for ls in scales])
        return plan if plan.holds() else None

    def __init__(self, block: Any, norms: Any, gammas: Any):
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2 = norms
        self.gamma1, self.gamma2 = gammas
        self.qkv, self.proj = (attn.qkv.weight, attn.qkv.bias), (attn.proj.weight, attn.proj.bias)
        self.fc1, self.fc2 = (mlp.fc1.weight, mlp.fc1.bias), (mlp.fc2.weight, mlp.fc2.bias)
        self.heads, self.head_dim, self.approximate = attn.num_heads, attn.head_dim, mlp.act.approximate
        self.dtype, self.device, self.channels = attn.qkv.weight.dtype, attn.qkv.weight.device, attn.qkv.in_features
        self.kernels: dict[Any, tuple[Any, ...]] = {}
        # Nobody may have hooked a part, put another in its place or changed its mode.
        modules = [part for part in block.modules() if part is not block]
        self.empty = [
            hooks
            for part in modules
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        ]
        same: list[tuple[dict[str, Any], str, Any]] = []
        for part in (block, *modules):
            same += [(part._modules, name, child) for name, child in part._modules.items()]
            same += [(part._parameters, name, parameter) for name, parameter in part._parameters.items()]
            if part is not block:
                same.append((part.__dict__, "forward", None))
                if isinstance(part, nn.Dropout) or not (part._modules or part._parameters):
                    same.append((part.__dict__, "training", part.training))
        self.places, self.names, self.values = zip(*same, strict=True)

    def attend(self, y: Tensor) -> Tensor:
        B, n, _ = y.shape
        q, k, v = linear(y, *self.qkv).view(B, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), *self.proj)

    def mlp(self, y: Tensor) -> Tensor:
        return linear(linear_gelu(y, *self.fc1, self.approximate), *self.fc2)

    def dense(self, x: Tensor) -> Tensor:
        weight, bias, eps = self.norm1
        branch = self.attend(F.layer_norm(x, (self.channels,), weight, bias, eps))
        x = x + (branch if self.gamma1 is None else branch.mul_(self.gamma1))
        weight, bias, eps = self.norm2
        branch = self.mlp(F.layer_norm(x, (self.channels,), weight, bias, eps))
        return x.add_(branch if self.gamma2 is None else branch.mul_(self.gamma2))

    def idle(
        self, x: Tensor, num_keep: int, num_prefix_tokens: int, inplace: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        front, middle, end, end_ = self._kernels(x, backend)
        indices, y = front(x, num_keep, num_prefix_tokens, *self.norm1, *self.qkv)
        tokens, y = middle(x, indices, self.attend(y), self.gamma1, 1.0, *self.norm2)
        branch = self.mlp(y)
        if not inplace:
            return end(x, indices, tokens, branch, self.gamma2, 1.0), indices
        end_(x, indices, tokens, branch, self.gamma2, 1.0)
        if not x.is_inference():  # or autograd would not notice the write
            torch.autograd.graph.increment_version(x)
        return x, indices

    def _kernels(self, x: Tensor, backend: str) -> tuple[Any, ...]:
        """The functions of the four ops; none of them has anything for PyTorch's dispatcher to do."""
        key = (backend, x.shape[1])
        found = self.kernels.get(key)
        if found is None:
            first = "cls_select_gather_norm"
            found = self.kernels[key] = (
                kernel(first, backend, (x,), like="select_gather_norm")
                or functools.partial(getattr(ops, first), backend=backend),
                *(kernel(op, backend, (x,)) for op in ("gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_")),
            )
        return found

    def holds(self) -> bool:
        weight = self.qkv[0]  # the same parameter after ``model.to``, with other data in it
        return (
            weight.dtype is self.dtype
            and weight.device == self.device
            # No loop of Python's: this runs in every layer.
            and not any(self.empty)
            and all(map(operator.is_, map(dict.get, self.places, self.names), self.values))
        )
