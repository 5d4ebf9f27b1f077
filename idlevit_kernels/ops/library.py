"""The torch.library ops, namespace "idlevit": schema, dispatch, fake and autograd, once an op.

Each op runs on the backend that ``backends.kernel`` finds at the call. A compiled or exported graph holds the op and
the backend that was asked for, "auto" unless one was named, so it runs on whatever device it finds. ``functional`` has
the same names with checked arguments and documentation; the block calls these. These ops check next to nothing: call
them with arguments that ``functional`` would accept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from ..versions import forward_ad_active, functorch_active, ordinary_dispatch
from . import backends, reference
from .dtypes import accumulate_dtype

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


def _define(schema: str) -> Any:
    """Defines ``name(arguments) -> result`` with a keyword-only ``backend`` and returns the op."""
    name, rest = schema.split("(", 1)
    arguments, result = rest.rsplit(") ->", 1)
    _lib.define(f"{name}({arguments}, *, str backend='auto') ->{result}", tags=(torch.Tag.pt2_compliant_tag,))
    in_place = name.endswith("_")
    specification = getattr(reference, name)

    def run(*args: Any, backend: str = "auto") -> Any:
        if in_place:
            check_inference(args[0])
        function = backends.kernel(name, backends.resolve(backend, name), args)
        result = _without_autocast(function, args)
        if in_place and not args[0].is_inference():  # or autograd would not notice the write
            torch.autograd.graph.increment_version(args[0])
        return result

    _lib.impl(name, run, "CompositeExplicitAutograd")
    op = getattr(torch.ops.idlevit, name).default

    def call(*args: Any, backend: str = "auto") -> Any:
        if direct(*args):
            return run(*args, backend=backend)
        if transformed():
            return _without_autocast(specification, args)
        if in_place and not is_compiling() and args[0].is_neg():
            # PyTorch would undo the lazy minus sign of a copy, write to that, and find no result to copy back.
            args[0].copy_(getattr(torch.ops.idlevit, name[:-1]).default(*args, backend=backend))
            return None
        return op(*args, backend=backend)

    return call


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


cls_direction = _define(
    "cls_direction(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight, Tensor? qkv_bias)"
    " -> Tensor"
)
token_scores = _define(
    "token_scores(Tensor x, Tensor direction, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor"
)
select_tokens = _define("select_tokens(Tensor scores, SymInt num_keep, SymInt num_prefix_tokens) -> Tensor")
select_gather_norm = _define(
    "select_gather_norm(Tensor x, Tensor scores, SymInt num_keep, SymInt num_prefix_tokens, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps) -> (Tensor indices, Tensor normed)"
)
gather_tokens = _define("gather_tokens(Tensor x, Tensor indices) -> Tensor")
scatter_tokens = _define("scatter_tokens(Tensor x, Tensor indices, Tensor tokens) -> Tensor")
scatter_tokens_ = _define("scatter_tokens_(Tensor(a!) x, Tensor indices, Tensor tokens) -> ()")
expand_tokens = _define("expand_tokens(Tensor tokens, Tensor indices, SymInt num_tokens) -> Tensor")
gather_add_norm = _define(
    "gather_add_norm(Tensor x, Tensor indices, Tensor branch, Tensor? gamma, float scale, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps) -> (Tensor tokens, Tensor normed)"
)
scatter_add_tokens = _define(
    "scatter_add_tokens(Tensor x, Tensor indices, Tensor tokens, Tensor branch, Tensor? gamma, float scale) -> Tensor"
)
scatter_add_tokens_ = _define(
    "scatter_add_tokens_(Tensor(a!) x, Tensor indices, Tensor tokens, Tensor branch, Tensor? gamma, float scale) -> ()"
)
gather_norm_backward = _define(
    "gather_norm_backward(Tensor grad, Tensor x, Tensor indices, Tensor? norm_weight, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
token_cut_loss = _define(
    "token_cut_loss(Tensor q, Tensor k, Tensor indices, float scale, SymInt num_prefix_tokens, str kind)"
    " -> (Tensor loss, Tensor lse, Tensor share)"
)
token_cut_loss_backward = _define(
    "token_cut_loss_backward(Tensor grad, Tensor q, Tensor k, Tensor indices, Tensor lse, Tensor share, float scale,"
    " SymInt num_prefix_tokens, str kind) -> (Tensor grad_q, Tensor grad_k)"
)


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
        fused = backends.kernel("cls_select_gather_norm", backend, args, like="select_gather_norm")
        if fused is not None:
            return fused(*args)
    with torch.no_grad():  # selection has no gradient
        direction = cls_direction(x, *norm, qkv_weight, qkv_bias, backend=backend)
        scores = token_scores(x, direction, *norm, backend=backend)
    return select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm, backend=backend)


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
        functions = {name: backends.kernel(name, backend, (x,)) for name in _IN_BLOCKS}
        functions["scatter_add_tokens_"] = _noticed_by_autograd(functions["scatter_add_tokens_"])
        functions["cls_select_gather_norm"] = backends.kernel(
            "cls_select_gather_norm", backend, (x,), like="select_gather_norm"
        ) or functools.partial(cls_select_gather_norm, backend=backend)
        functions |= {name: functools.partial(op, backend=backend) for name, op in _SELDOM.items()}
        found = _calls[key] = Calls(True, functions)
    return found


def calls_with(calls: Calls, t: Tensor, backend: str) -> Calls:
    """The same ops for a tensor that somebody else's module returned; past the dispatcher only if it is plain, too."""
    if not calls.direct or (type(t) in PLAIN and not t.is_neg()):
        return calls
    return _dispatching(backend)


_SELDOM = {"token_cut_loss": token_cut_loss, "select_tokens": select_tokens}
_IN_BLOCKS = {
    "cls_direction": cls_direction,
    "token_scores": token_scores,
    "select_gather_norm": select_gather_norm,
    "gather_tokens": gather_tokens,
    "gather_add_norm": gather_add_norm,
    "scatter_add_tokens": scatter_add_tokens,
    "scatter_add_tokens_": scatter_add_tokens_,
}


def _dispatching(backend: str) -> Calls:
    ops = {**_IN_BLOCKS, **_SELDOM, "cls_select_gather_norm": cls_select_gather_norm}
    return Calls(False, {name: functools.partial(op, backend=backend) for name, op in ops.items()})


def _noticed_by_autograd(in_place: Any) -> Any:
    def call(x: Tensor, *args: Any) -> None:
        check_inference(x)
        in_place(x, *args)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)

    return call


# Fakes: what each op returns, without computing it.


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"idlevit::{name}", lib=_lib)


@_fake("cls_direction")
def _(x: Tensor, *_: Any, backend: str = "auto") -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


@_fake("token_scores")
def _(x: Tensor, direction: Tensor, *_: Any, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


@_fake("select_tokens")
def _(scores: Tensor, num_keep: int, num_prefix_tokens: int, backend: str = "auto") -> Tensor:
    return scores.new_empty((scores.shape[0], num_prefix_tokens + num_keep), dtype=torch.int64)


@_fake("select_gather_norm")
def _(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, *_: Any, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    n = num_prefix_tokens + num_keep
    return x.new_empty((x.shape[0], n), dtype=torch.int64), x.new_empty((x.shape[0], n, x.shape[2]))


@_fake("gather_tokens")
def _(x: Tensor, indices: Tensor, backend: str = "auto") -> Tensor:
    return x.new_empty((*indices.shape, x.shape[2]))


@_fake("scatter_tokens")
def _(x: Tensor, indices: Tensor, tokens: Tensor, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape)


@_fake("scatter_tokens_")
def _(x: Tensor, indices: Tensor, tokens: Tensor, backend: str = "auto") -> None:
    return None


@_fake("expand_tokens")
def _(tokens: Tensor, indices: Tensor, num_tokens: int, backend: str = "auto") -> Tensor:
    return tokens.new_empty((tokens.shape[0], num_tokens, tokens.shape[2]))


@_fake("gather_add_norm")
def _(x: Tensor, indices: Tensor, *_: Any, backend: str = "auto") -> tuple[Tensor, Tensor]:
    shape = (*indices.shape, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape)


@_fake("scatter_add_tokens")
def _(x: Tensor, *_: Any, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape)


@_fake("scatter_add_tokens_")
def _(x: Tensor, *_: Any, backend: str = "auto") -> None:
    return None


@_fake("gather_norm_backward")
def _(grad: Tensor, x: Tensor, *_: Any, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    channels, acc = x.shape[2], accumulate_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(channels, dtype=acc), x.new_empty(channels, dtype=acc)


@_fake("token_cut_loss")
def _(q: Tensor, k: Tensor, *_: Any, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(q.dtype)
    return q.new_empty((), dtype=acc), q.new_empty(q.shape[:2], dtype=acc), q.new_empty(q.shape[:2], dtype=acc)


@_fake("token_cut_loss_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, *_: Any, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


# Autograd. The indices are constants of the backward pass: selection has no gradient. Where a backward is built from
# differentiable ops alone (gather, scatter, expand) it can be differentiated again.


def _autograd(name: str, backward: Any, setup: Any) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.backend = keyword_only_inputs["backend"]
        setup(ctx, inputs, output)

    torch.library.register_autograd(f"idlevit::{name}", backward, setup_context=setup_context, lib=_lib)


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)


def _layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in the accumulate type."""
    acc, shape = accumulate_dtype(x.dtype), x.shape[-1:]
    x, grad = x.to(acc), grad.to(acc)
    weight = x.new_ones(shape) if weight is None else weight.to(acc)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, None, eps)
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, weight, [True, True, True])


def _token_scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, direction, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, direction, weight, bias)


def _token_scores_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, direction, weight, bias = ctx.saved_tensors
    acc = grad.dtype
    u = direction.to(acc)
    normed = torch.nn.functional.layer_norm(
        x.to(acc), x.shape[-1:], None if weight is None else weight.to(acc), None if bias is None else bias.to(acc),
        ctx.eps,
    )  # fmt: skip
    grad_direction = torch.einsum("bt,btc->bc", grad, normed)
    grad_normed = grad.unsqueeze(-1) * u.unsqueeze(1)
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad_normed, x, weight, ctx.eps)
    grad_direction = grad_direction.to(direction.dtype)
    return grad_x.to(x.dtype), grad_direction, _cast(grad_weight, weight), _cast(grad_bias, bias), None


def _gather_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(indices)


def _gather_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return expand_tokens(grad, indices, ctx.num_tokens, backend=ctx.backend), None


def _expand_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _expand_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return gather_tokens(grad, indices, backend=ctx.backend), None, None


def _scatter_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, tokens = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(indices)


def _clear_rows(grad: Tensor, indices: Tensor, backend: str) -> Tensor:
    """The gradient that passes a scatter to the rows it left alone."""
    zeros = grad.new_zeros((*indices.shape, grad.shape[2]))
    return scatter_tokens(grad, indices, zeros, backend=backend)


def _scatter_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    grad_x = _clear_rows(grad, indices, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_tokens = gather_tokens(grad, indices, backend=ctx.backend).to(ctx.dtype)
    return grad_x, None, grad_tokens


def _save_branch(ctx: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """What the backward needs of the branch: its type, and itself only where gamma has a gradient."""
    ctx.branch_dtype = branch.dtype
    return None if gamma is None else branch


def _branch_backward(
    ctx: Any, grad: Tensor, branch: Tensor | None, gamma: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of branch and gamma, where ``tokens + scale * gamma * branch`` has the gradient ``grad``."""
    if branch is None or gamma is None:
        return (grad if ctx.scale == 1 else grad * ctx.scale).to(ctx.branch_dtype), None
    grad_gamma = (ctx.scale * grad * branch).sum((0, 1), dtype=accumulate_dtype(grad.dtype))
    return (grad * (ctx.scale * gamma)).to(ctx.branch_dtype), _cast(grad_gamma, gamma)


def _scatter_add_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, tokens, branch, gamma, ctx.scale = inputs
    ctx.dtype = tokens.dtype
    ctx.save_for_backward(indices, _save_branch(ctx, branch, gamma), gamma)


def _scatter_add_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    indices, branch, gamma = ctx.saved_tensors
    grad_x = _clear_rows(grad, indices, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_tokens = gather_tokens(grad, indices, backend=ctx.backend)
    grad_branch, grad_gamma = _branch_backward(ctx, grad_tokens, branch, gamma)
    return grad_x, None, grad_tokens.to(ctx.dtype), grad_branch, grad_gamma, None


def _select_gather_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, _, weight, bias, ctx.eps = inputs
    indices, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, indices, weight, bias)


def _select_gather_norm_backward(ctx: Any, _: Any, grad: Tensor) -> tuple[Any, ...]:
    x, indices, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = gather_norm_backward(grad, x, indices, weight, ctx.eps, backend=ctx.backend)
    return grad_x, None, None, None, _cast(grad_weight, weight), _cast(grad_bias, bias), None


def _gather_add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, branch, gamma, ctx.scale, weight, bias, ctx.eps = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(indices, _save_branch(ctx, branch, gamma), gamma, weight, bias, output[0])


def _gather_add_norm_backward(ctx: Any, grad_tokens: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
    indices, branch, gamma, weight, bias, tokens = ctx.saved_tensors
    grad, grad_weight, grad_bias = _layer_norm_backward(grad_normed, tokens, weight, ctx.eps)
    grad = grad_tokens + grad.to(grad_tokens.dtype)
    grad_x = expand_tokens(grad, indices, ctx.num_tokens, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    grad_branch, grad_gamma = _branch_backward(ctx, grad, branch, gamma)
    return (
        grad_x, None, grad_branch, grad_gamma, None, _cast(grad_weight, weight), _cast(grad_bias, bias), None,
    )  # fmt: skip


def _token_cut_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, indices, *ctx.options = inputs
    _, lse, share = output
    ctx.mark_non_differentiable(lse, share)
    ctx.save_for_backward(q, k, indices, lse, share)


def _token_cut_loss_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_q, grad_k = token_cut_loss_backward(grad, *ctx.saved_tensors, *ctx.options, backend=ctx.backend)
    return grad_q, grad_k, None, None, None, None


def _differentiable_once(op: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"{op}: it is differentiable once, got a second backward pass (create_graph=True)")

    return backward


_autograd("token_scores", _token_scores_backward, _token_scores_setup)
_autograd("gather_tokens", _gather_tokens_backward, _gather_tokens_setup)
_autograd("expand_tokens", _expand_tokens_backward, _expand_tokens_setup)
_autograd("scatter_tokens", _scatter_tokens_backward, _scatter_tokens_setup)
_autograd("scatter_add_tokens", _scatter_add_tokens_backward, _scatter_add_tokens_setup)
_autograd("select_gather_norm", _select_gather_norm_backward, _select_gather_norm_setup)
_autograd("gather_add_norm", _gather_add_norm_backward, _gather_add_norm_setup)
_autograd("token_cut_loss", _token_cut_loss_backward, _token_cut_loss_setup)
_autograd("gather_norm_backward", _differentiable_once("select_gather_norm"), lambda ctx, inputs, output: None)
_autograd("token_cut_loss_backward", _differentiable_once("token_cut_loss"), lambda ctx, inputs, output: None)
