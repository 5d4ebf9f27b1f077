"""The torch.library ops, namespace "idlevit", each defined from its record in ``reference``.

Each op runs on the backend that ``backends.kernel`` finds at the call. A compiled or exported graph holds the op and
the backend that was asked for, "auto" unless one was named, so it runs on whatever device it finds. ``functional`` has
the same names with checked arguments and documentation; the block calls these. A record's ``call`` checks next to
nothing: give it arguments that ``functional`` would accept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from ..versions import forward_ad_active, functorch_active, ordinary_dispatch
from . import backends
from . import reference as ops
from .record import RECORDS, Op

_lib = torch.library.Library("idlevit", "DEF")

PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors whose elements lie where they say


def direct(*args: Any) -> bool:
    """Whether the dispatcher would do nothing for this call but find the kernel: no gradients, no compiler, tracer,
    transform, mode, autocast or profiler, and every tensor a plain one (no subclass, no lazy minus sign).

    Then the kernel is called as it is. With the caches full of a layer's weights, the way through the dispatcher into
    Python costs 30 us an op (measured at batch 1), which is more than the kernels take.
    """
    if (
        is_compiling()  # first: a compiler cannot trace what follows
        or is_grad_enabled()
        or args[0].is_meta
        or not ordinary_dispatch()
        or forward_ad_active()
    ):
        return False
    for value in args:
        if type(value) in PLAIN:
            if value.is_neg():
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work.

    It has rules for PyTorch's own operators, not for these ops, so the references, which are made of PyTorch's, run.
    """
    return not is_compiling() and (forward_ad_active() or functorch_active())


def _define(op: Op[..., Any]) -> None:
    """Makes ``torch.ops.idlevit.<name>`` of a record, and its ``call``."""
    name, in_place, specification = op.name, op.in_place, op.reference
    _lib.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any, backend: str = "auto") -> Any:
        if in_place:
            check_inference(args[0])
        function = backends.kernel(name, backends.resolve(backend, name), args)
        result = _without_autocast(function, args)
        if in_place and not args[0].is_inference():  # or autograd would not notice the write
            torch.autograd.graph.increment_version(args[0])
        return result

    _lib.impl(name, run, "CompositeExplicitAutograd")
    dispatched = getattr(torch.ops.idlevit, name).default

    def call(*args: Any, backend: str = "auto") -> Any:
        if direct(*args):
            return run(*args, backend=backend)
        if transformed():
            return _without_autocast(specification, args)
        if in_place and not is_compiling() and args[0].is_neg():
            # PyTorch would undo the lazy minus sign of a copy, write to that, and find no result to copy back.
            args[0].copy_(getattr(torch.ops.idlevit, name[:-1]).default(*args, backend=backend))
            return None
        return dispatched(*args, backend=backend)

    op.call = call
    if op.fake_function is not None:
        _register_fake(name, op.fake_function)
    if op.backward_function is not None and op.setup_function is not None:
        _register_autograd(name, op.backward_function, op.setup_function)
    elif op.derivative_of is not None:
        _register_autograd(name, _differentiable_once(op.derivative_of), lambda ctx, inputs, output: None)


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    torch.library.register_fake(f"idlevit::{name}", lambda *args, backend="auto": fake(*args), lib=_lib)


def _register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.backend = keyword_only_inputs["backend"]
        setup(ctx, inputs, output)

    torch.library.register_autograd(f"idlevit::{name}", backward, setup_context=setup_context, lib=_lib)


def _differentiable_once(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"{op}: it is differentiable once, got a second backward pass (create_graph=True)")

    return backward


def _without_autocast(function: Any, args: tuple[Any, ...]) -> Any:
    """The op's types are those of its arguments."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def check_inference(x: Tensor) -> None:
    """Raises PyTorch's own error where x was made in inference mode and is to be written outside of it."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        x.narrow(0, 0, 0).zero_()


for _record in RECORDS.values():
    _define(_record)


def cls_select_gather_norm(
    x: Tensor,
    num_keep: int,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``cls_direction``, ``token_scores`` and ``select_gather_norm``, in one call of a backend that has one."""
    norm = (norm_weight, norm_bias, eps)
    if direct(x, *norm, qkv_weight, qkv_bias):
        args = (x, num_keep, num_prefix_tokens, *norm, qkv_weight, qkv_bias)
        fused = backends.fusion("cls_select_gather_norm", "select_gather_norm", backend, args)
        if fused is not None:
            return fused(*args)
    with torch.no_grad():  # selection has no gradient
        direction = ops.cls_direction.call(x, *norm, qkv_weight, qkv_bias, backend=backend)
        scores = ops.token_scores.call(x, direction, *norm, backend=backend)
    return ops.select_gather_norm.call(x, scores, num_keep, num_prefix_tokens, *norm, backend=backend)


class Calls:
    """The ops of a block, each called on one backend.

    Attributes:
        direct: whether they go past PyTorch's dispatcher; then nobody but the caller can see a tensor in between.
    """

    def __init__(self, direct: bool, functions: Mapping[str, Any]):
        self.direct = direct
        self.cls_direction = functions["cls_direction"]
        self.token_scores = functions["token_scores"]
        self.select_tokens = functions["select_tokens"]
        self.select_gather_norm = functions["select_gather_norm"]
        self.cls_select_gather_norm = functions["cls_select_gather_norm"]
        self.gather_tokens = functions["gather_tokens"]
        self.gather_add_norm = functions["gather_add_norm"]
        self.scatter_add_tokens = functions["scatter_add_tokens"]
        self.scatter_add_tokens_ = functions["scatter_add_tokens_"]
        self.token_cut_loss = functions["token_cut_loss"]


_calls: dict[Any, Calls] = {}


def calls_for(x: Tensor, backend: str) -> Calls:
    """The ops for tokens x [B, T, C] and what is computed from them and from plain parameters.

    Where a dispatcher has nothing to do, one look at x is enough for all of them, and each kernel is looked up once for
    all calls that are alike. ``backend`` is a name that ``resolve`` has returned.
    """
    if not direct(x):
        return _dispatching(backend)
    _, T, C = x.shape
    key = (backend, x.dtype, x.device, T, C)
    found = _calls.get(key)
    if found is None:
        functions = {op.name: backends.kernel(op.name, backend, (x,)) for op in _IN_BLOCKS}
        functions["scatter_add_tokens_"] = _noticed_by_autograd(functions["scatter_add_tokens_"])
        functions["cls_select_gather_norm"] = backends.fusion(
            "cls_select_gather_norm", "select_gather_norm", backend, (x,)
        ) or functools.partial(cls_select_gather_norm, backend=backend)
        functions |= {op.name: functools.partial(op.call, backend=backend) for op in _SELDOM}
        found = _calls[key] = Calls(True, functions)
    return found


def calls_with(calls: Calls, t: Tensor, backend: str) -> Calls:
    """The same ops for a tensor that somebody else's module returned; past the dispatcher only if it is plain, too."""
    if not calls.direct or (type(t) in PLAIN and not t.is_neg()):
        return calls
    return _dispatching(backend)


_SELDOM = (ops.token_cut_loss, ops.select_tokens)
_IN_BLOCKS = (
    ops.cls_direction,
    ops.token_scores,
    ops.select_gather_norm,
    ops.gather_tokens,
    ops.gather_add_norm,
    ops.scatter_add_tokens,
    ops.scatter_add_tokens_,
)


def _dispatching(backend: str) -> Calls:
    functions = {op.name: op.call for op in (*_IN_BLOCKS, *_SELDOM)}
    functions["cls_select_gather_norm"] = cls_select_gather_norm
    return Calls(False, {name: functools.partial(call, backend=backend) for name, call in functions.items()})


def _noticed_by_autograd(in_place: Any) -> Any:
    def call(x: Tensor, *args: Any) -> None:
        check_inference(x)
        in_place(x, *args)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)

    return call
