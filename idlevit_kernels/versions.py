"""Every private name of torch, timm, transformers and Triton that the package uses, each with what stands in for it.

A private name may vanish in any release. So each is looked for once, here, and where it is missing the public way is
taken: slower, never wrong. Then one line of the log says so, and ``report()`` lists it, which ``idlevit info`` prints.
Nothing private is used anywhere else (a test searches for it).

Only torch is imported. The classes of timm and transformers are looked up among the modules that are loaded already: a
model of a library that nobody imported cannot exist.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import platform
import re
import sys
import types
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map_only as tree_map_only

FLOORS = {
    "Python": "3.10",
    "torch": "2.10.0",
    "timm": "1.0.26",
    "triton": "3.6.0",
    "transformers": "5.18.0",
    "numpy": "1.26.4",
}
"""The oldest versions that the tests are run on, those of pyproject.toml (``tests/matrix.sh`` runs them)."""

_logger = logging.getLogger("idlevit_kernels")
T = TypeVar("T")


class Gate(NamedTuple):
    """One thing that is used where this machine's versions have it.

    Attributes:
        name: what it is for.
        available: whether it is used.
        detail: the private name, or why it is not used and what is done instead.
    """

    name: str
    available: bool
    detail: str


_gates: list[Gate] = []


@functools.cache  # one line for each
def _log_lost(name: str, detail: str) -> None:
    _logger.warning("a fast path is off: %s: %s", name, detail)


def _probe(name: str, private: str, find: Callable[[], T], fallback: T, instead: str) -> T:
    """What ``find`` returns; the fallback where a name that it needs is missing."""
    try:
        found = find()
    except (AttributeError, ImportError):
        detail = f"torch {torch.__version__} has no {private}; {instead}"
        _gates.append(Gate(name, False, detail))
        _log_lost(name, detail)
        return fallback
    _gates.append(Gate(name, True, private))
    return found


def _always() -> bool:
    return True


def _never() -> bool:
    return False


# Who watches or changes a call. Where torch does not tell, the answer is the one that keeps the ordinary path.


def _find_any_global_hook() -> Callable[[], bool]:
    from torch.nn.modules.module import _has_any_global_hook

    return _has_any_global_hook


any_global_module_hook: Callable[[], bool] = _probe(
    "global module hooks",
    "torch.nn.modules.module._has_any_global_hook",
    _find_any_global_hook,
    _always,
    "modules are called as they are, in case a hook on all modules watches them",
)
"""Whether a hook on every module is registered (``register_module_forward_hook`` and its like); since torch 2.0.
Fallback: True."""


def _find_ordinary_dispatch() -> Callable[[], bool]:
    from torch._C import DispatchKey, DispatchKeySet, _dispatch_tls_local_include_set, _is_any_autocast_enabled
    from torch.autograd import _profiler_enabled

    # What the dispatcher of every thread includes while gradients are off: in inference mode, and under no_grad.
    inference = DispatchKeySet(DispatchKey.BackendSelect)
    ordinary = {inference.raw_repr(), inference.add(DispatchKey.ADInplaceOrView).raw_repr()}

    has_torch_function, plain = torch.overrides.has_torch_function, (torch.empty(0),)

    def ordinary_dispatch() -> bool:
        return (
            not _is_any_autocast_enabled()
            and not _profiler_enabled()
            and not has_torch_function(plain)  # it is true of a plain tensor only within a TorchFunctionMode
            and _dispatch_tls_local_include_set().raw_repr() in ordinary
        )

    return ordinary_dispatch


ordinary_dispatch: Callable[[], bool] = _probe(
    "calls past the dispatcher",
    "torch._C._dispatch_tls_local_include_set, torch._C._is_any_autocast_enabled, torch.autograd._profiler_enabled",
    _find_ordinary_dispatch,
    _never,
    "every op goes through torch's dispatcher",
)
"""Whether torch's dispatcher has nothing to do for a plain tensor without gradients but to find the kernel: no
transform, tracer, dispatch or function mode, autocast or profiler in this thread. Since torch 2.1. Fallback: False."""


def _find_functorch_level() -> Callable[[], bool]:
    from torch._C._functorch import maybe_current_level

    return lambda: maybe_current_level() is not None


functorch_active: Callable[[], bool] = _probe(
    "transforms of torch.func",
    "torch._C._functorch.maybe_current_level",
    _find_functorch_level,
    _always,
    "every op is taken for one under a transform",
)
"""Whether a transform of ``torch.func`` (grad, vjp, jvp, vmap) runs in this thread; since torch 2.0. Fallback: True."""


def _find_forward_ad_level() -> Callable[[], bool]:
    from torch.autograd import forward_ad

    forward_ad._current_level  # noqa: B018 (it is looked for)
    return lambda: forward_ad._current_level >= 0


forward_ad_active: Callable[[], bool] = _probe(
    "forward-mode differentiation",
    "torch.autograd.forward_ad._current_level",
    _find_forward_ad_level,
    _always,
    "every tensor is asked for its tangent",
)
"""Whether a ``torch.autograd.forward_ad.dual_level`` is entered, so that tensors may carry tangents; since torch 1.11.
Fallback: True; then ``has_tangent`` decides, which asks each tensor."""


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a tangent of forward-mode differentiation; by the public ``unpack_dual``."""
    if not forward_ad_active():
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


# What nn.Module keeps about its hooks.

_WATCHING = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOW_TO_CALL = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def _find_hook_dictionaries() -> Callable[[nn.Module], bool]:
    missing = [name for name in _WATCHING if name not in vars(nn.Module())]
    if missing:
        raise AttributeError(missing)

    def has_hooks(module: nn.Module) -> bool:
        return bool(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )

    return has_hooks


_assume_hooks: Callable[[nn.Module], bool] = lambda module: True  # noqa: E731 (typed, as the checker wants it)

has_hooks: Callable[[nn.Module], bool] = _probe(
    "hooks of a module",
    "torch.nn.Module's " + ", ".join(_WATCHING),
    _find_hook_dictionaries,
    _assume_hooks,
    "modules are called as they are, in case hooks watch them",
)
"""Whether a forward or backward hook is registered on this very module; all four since torch 2.0. Fallback: True."""

HOOKS = tuple(name for name in _WATCHING + _HOW_TO_CALL if name in vars(nn.Module()))
"""The attributes by which ``nn.Module`` keeps its hooks and how they want to be called, those that this torch has. A
module that takes another's place takes over these dictionaries. Fallback: those that are missing are not taken over."""

WATCHING_HOOKS = tuple(name for name in _WATCHING if name in HOOKS)
"""Those of HOOKS that are not empty when somebody watches the module's calls."""


COMPILED = "_compiled_call_impl"
"""The attribute that ``module.compile()`` sets."""


def compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: then its ``__call__`` runs something else than its ``forward``.

    The attribute ``_compiled_call_impl`` exists since torch 2.2; without it no module can be compiled so.
    """
    return getattr(module, COMPILED, None) is not None


# oneDNN, which F.linear does not call for float32. Found by a call, as a build or a processor may refuse it.


def _call_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], algorithm)


def _call_pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, rows)


def _refusal(call: Callable[[], Tensor], expected: Tensor) -> str:
    """Why the call does not give what is expected; "" if it does."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    try:
        found = call()
    except (AttributeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        return f"in torch {torch.__version__}: {str(error).splitlines()[0].partition('. ')[0]}"
    right = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    return "" if right else f"in torch {torch.__version__} it returns a wrong product"


@functools.cache
def _onednn_reasons() -> tuple[str, str]:
    """Why not the linear layer, why not with packed weights."""
    # Whatever the default device is: a model may be made on "meta".
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        x, weight = torch.randn(2, 16, device="cpu"), torch.randn(32, 16, device="cpu")
        expected = x @ weight.T
        plain = _refusal(lambda: _call_linear(x, weight, None, "none", ""), expected)
        packed = plain or _refusal(lambda: _call_linear(x, _call_pack(weight, 2), None, "none", ""), expected)
    if torch.backends.mkldnn.is_available():  # where it is not, that is the build's choice and nothing is lost
        for name, reason in (("oneDNN's linear layer", plain), ("packed weights of oneDNN", packed)):
            if reason:
                _log_lost(name, f"{reason}; F.linear is called")
    return plain, packed


def onednn_reason() -> str:
    """Why ``onednn_linear`` is not to be called (``F.linear`` is, then); "" where it works."""
    return _onednn_reasons()[0]


def onednn_pack_reason() -> str:
    """Why ``onednn_pack`` is not to be called (weights stay as they are, then); "" where it works."""
    return _onednn_reasons()[1]


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """``F.linear`` by oneDNN, with ``F.gelu(approximate=gelu)`` within the same call if gelu is "none" or "tanh".

    float32 on a CPU without gradients; the weight is an ordinary one or one from ``onednn_pack``. The op
    ``torch.ops.mkldnn._linear_pointwise`` is inductor's, since torch 2.0.
    """
    if gelu is None:
        return _call_linear(x, weight, bias, "none", "")
    return _call_linear(x, weight, bias, "gelu", gelu)


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """A weight [out, in] in the order that oneDNN likes best for inputs of ``rows`` rows; any number of rows works.

    Such a tensor cannot be copied, pickled or saved. The op ``torch.ops.mkldnn._reorder_linear_weight`` is inductor's,
    since torch 2.0.
    """
    return _call_pack(weight, rows)


def onednn_linear_op() -> Any:
    """The op that ``onednn_linear`` calls, for the FLOP counter; None where this torch has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# CUDA


_public_stream: Callable[[int], int] = lambda device: torch.cuda.current_stream(device).cuda_stream  # noqa: E731

cuda_stream: Callable[[int], int] = (
    _public_stream
    if torch.version.cuda is None  # then the private name is missing for that reason, and no call can come
    else _probe(
        "current CUDA stream",
        "torch._C._cuda_getCurrentRawStream",
        lambda: torch._C._cuda_getCurrentRawStream,
        _public_stream,
        "torch.cuda.current_stream is asked, some microseconds a launch",
    )
)
"""The address of the current stream of the CUDA device with this index. The private function makes no Stream object;
since torch 1.8. Fallback: ``torch.cuda.current_stream``."""


def leave_pool(device: int, pool: Any) -> None:
    """Takes the allocator of the device out of the memory pool of a capture that has failed, if it is still in it.

    The two functions of ``torch._C`` are what torch's own graphs call, since torch 2.0. Fallback: nothing; then memory
    goes on to come from that pool.
    """
    leave = getattr(torch._C, "_cuda_endAllocateToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if leave is None or release is None:
        return
    try:
        leave(device, pool)
    except RuntimeError as error:  # the capture itself had ended it
        _logger.debug("the pool of a failed capture was left already: %s", error)
    else:
        release(device, pool)


# The FLOP counter


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """Tells torch's FLOP counter what a call of the op costs, unless it knows.

    ``register_flop_formula`` is public and refuses an op that it knows, with a RuntimeError. Not at import: the
    counter's module imports triton.
    """
    from torch.utils.flop_counter import register_flop_formula

    try:
        register_flop_formula(op)(formula)
    except RuntimeError as error:
        if "duplicate" not in str(error):
            raise


def attention_ops() -> list[tuple[Any, Any]]:
    """What ``F.scaled_dot_product_attention`` runs on a CPU beside its like on CUDA, forward and backward.

    The FLOP counter knows the latter alone, as of torch 2.15. Fallback: without a pair whose names have changed; then
    the counter leaves its products out, unless it knows them by the new name.
    """
    aten, name = torch.ops.aten, "_scaled_dot_product_flash_attention"
    pairs = [
        (getattr(aten, f"{name}_for_cpu{suffix}", None), getattr(aten, f"{name}{suffix}", None))
        for suffix in ("", "_backward")
    ]
    return [pair for pair in pairs if None not in pair]


# Two names of torch that only their modules are private of: TorchDispatchMode, documented, and tree_map_only, imported
# above. There is no other way to what they do, and torch does not work without them.


# The compiler


def missing_cpp_compiler() -> str | None:
    """What inductor says where it finds no C++ compiler; None where it finds one, or cannot be asked.

    Its ``get_cpp_compiler`` is private. Fallback: None; then compiling fails with inductor's own words.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:
        return None
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error)
    return None


def aoti_compile(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Writes the program as an AOTInductor package. Documented by torch under this private module; no other way."""
    torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))


def aoti_load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The model of an AOTInductor package; documented like ``aoti_compile``."""
    return torch._inductor.aoti_load_package(os.fspath(path))


# Triton


class Triton(NamedTuple):
    """What compiles and records kernels without a GPU; private, as Triton has no stable interface for it.

    Attributes:
        jit_function: class of a kernel; its ``run`` is what ``kernel[grid](...)`` calls.
        ast_source, gpu_target: what ``triton.compile`` takes.
        cuobjdump: path of the tool in Triton's wheel that prints a kernel's registers and stack.
    """

    jit_function: Any
    ast_source: Any
    gpu_target: Any
    cuobjdump: str


def triton_interpreter_reason() -> str | None:
    """Why Triton's interpreter would fail on a loop whose bound is an argument; None where it works.

    Before Triton 3.7 it turns an array of one element into an integer, which NumPy 2.4 refuses.
    """
    triton, numpy = installed("triton"), installed("numpy")
    if numpy is None or _numbers(numpy) < (2, 4) or _numbers(triton) >= (3, 7):
        return None
    return f"the interpreter of triton {triton} fails with NumPy 2.4 and newer; install triton>=3.7 or numpy<2.4"


@functools.cache
def triton_compiler() -> Triton:
    """Imports Triton. Raises ImportError, which says what is missing, where it or one of these names is not there.

    ``knobs`` exist since Triton 3.4, the others since 3.0. Nothing that runs a model needs them.
    """
    import triton

    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if not callable(triton.JITFunction.run):
            raise AttributeError("triton.JITFunction.run is no function")
        return Triton(triton.JITFunction, ASTSource, GPUTarget, triton.knobs.nvidia.cuobjdump.path)
    except (AttributeError, ImportError) as error:
        raise ImportError(f"triton {triton.__version__} is laid out otherwise than is known here: {error}") from error


# Classes of timm and transformers that are known by name. Each with the modules that have or had it: the public one
# first, through which a class can move without notice.

CLASSES: dict[str, tuple[str, ...]] = {
    "Attention": ("timm.layers", "timm.models.vision_transformer"),
    "AttentionRope": ("timm.layers", "timm.layers.attention"),
    "Dinov2DropPath": ("transformers.models.dinov2.modeling_dinov2",),
    "Dinov2LayerScale": ("transformers.models.dinov2.modeling_dinov2",),
    "Dinov2WithRegistersDropPath": ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",),
    "Dinov2WithRegistersLayerScale": ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",),
    "DropPath": ("timm.layers",),
    "Eva": ("timm.models.eva",),
    "EvaAttention": ("timm.models.eva",),
    "EvaBlock": ("timm.models.eva",),
    "GluMlp": ("timm.layers",),
    "LayerNorm": ("timm.layers",),
    "LayerNormFp32": ("timm.layers",),
    "LayerScale": ("timm.layers", "timm.models.vision_transformer"),
    "LVViT": ("idlevit_kernels.models.lvvit",),
    "LocallyGroupedAttn": ("timm.models.twins",),
    "Mlp": ("timm.layers",),
    "PyramidVisionTransformerV2": ("timm.models.pvt_v2",),
    "Scale": ("idlevit_kernels.models.lvvit",),
    "SwiGLU": ("timm.layers",),
    "VisionTransformer": ("timm.models.vision_transformer",),
    "Block": ("timm.models.vision_transformer",),
    "ResPostBlock": ("timm.models.vision_transformer",),
    "SwinTransformer": ("timm.models.swin_transformer",),
    "SwinTransformerBlock": ("timm.models.swin_transformer",),
    "SwinTransformerStage": ("timm.models.swin_transformer",),
    "SwinTransformerV2": ("timm.models.swin_transformer_v2",),
    "SwinTransformerV2Stage": ("timm.models.swin_transformer_v2",),
    "Twins": ("timm.models.twins",),
    "WindowAttention": ("timm.models.swin_transformer",),
    "SwinTransformerV2Block": ("timm.models.swin_transformer_v2",),
    "WindowAttentionV2": ("timm.models.swin_transformer_v2",),
    "GlobalSubSampleAttn": ("timm.models.twins",),
    "TwinsBlock": ("timm.models.twins",),
    "ViTLayer": ("transformers.models.vit.modeling_vit",),
    "DeiTLayer": ("transformers.models.deit.modeling_deit",),
    "Dinov2Layer": ("transformers.models.dinov2.modeling_dinov2",),
    "Dinov2WithRegistersLayer": ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",),
    "PreTrainedModel": ("transformers.modeling_utils",),
}
# Two classes of one name: what the second is called there.
_NAME_THERE = {"WindowAttentionV2": "WindowAttention", "TwinsBlock": "Block"}

# The attributes and functions that a forward reads, in any version that was read: what its formula is made of. One that
# reads another has learnt something that the formula here does not know (so came head_dim, gates and fewer heads of
# keys). Bytecode has them, so nothing is called; they are the same in Python 3.10 to 3.13.
_ATTENTION = (
    "F attn_dim attn_drop fused_attn gate head_dim k_norm maybe_add_mask norm num_heads p permute proj proj_drop q_norm"
    " qkv reshape resolve_self_attn_mask scale scaled_dot_product_attention shape sigmoid softmax training transpose"
    " unbind"
)
_ROTARY = "apply_rot_embed_cat cat getattr k_proj num_prefix_tokens q_proj torch type_as v_proj"
_BLOCK = "attn drop_path1 drop_path2 mlp norm1 norm2"
_WINDOWS = "attn_drop num_heads permute proj proj_drop qkv reshape shape softmax torch transpose unbind unsqueeze view"
_VIT_LAYER = "attention dropout layernorm_after layernorm_before mlp"
_DINOV2_LAYER = "attention drop_path layer_scale1 layer_scale2 mlp norm1 norm2"
_READS = {
    "Attention": _ATTENTION,
    "AttentionRope": f"{_ATTENTION} {_ROTARY} num_kv_groups num_kv_heads repeat_interleave",
    "DropPath": "drop_path drop_prob scale_by_keep training",
    "EvaAttention": f"{_ATTENTION} {_ROTARY} k_bias linear q_bias qkv_bias_separate v_bias weight",
    "EvaBlock": f"{_BLOCK} gamma_1 gamma_2",
    "GluMlp": "act chunk chunk_dim drop1 drop2 fc1 fc2 gate_last norm",
    "LayerNorm": "F _fast_norm bias eps fast_layer_norm layer_norm normalized_shape weight",
    "LayerNormFp32": "F bias dtype eps float layer_norm normalized_shape to weight",
    "LayerScale": "gamma inplace mul_",
    "Mlp": "act drop1 drop2 fc1 fc2 norm",
    "SwiGLU": "act drop1 drop2 fc1_g fc1_x fc2 norm",
    "Block": f"{_BLOCK} ls1 ls2",
    "ResPostBlock": _BLOCK,
    "SwinTransformerBlock": "_attn drop_path1 drop_path2 mlp norm1 norm2 reshape shape",
    "WindowAttention": f"{_WINDOWS} _get_rel_pos_bias expand functional fused_attn nn p scale"
    " scaled_dot_product_attention training",
    "SwinTransformerV2Block": "_attn drop_path1 drop_path2 mlp norm1 norm2 reshape shape",
    "WindowAttentionV2": f"{_WINDOWS} F cat clamp contiguous cpb_mlp exp k_bias linear log logit_scale math normalize"
    " q_bias qkv_bias_separate relative_coords_table relative_position_index sigmoid v_bias weight window_size",
    "GlobalSubSampleAttn": "attn_drop functional fused_attn kv nn norm num_heads p permute proj proj_drop q reshape"
    " scale scaled_dot_product_attention shape softmax sr torch training transpose unbind",
    "TwinsBlock": _BLOCK,
    "ViTLayer": _VIT_LAYER,
    "DeiTLayer": _VIT_LAYER,
    "Dinov2Layer": _DINOV2_LAYER,
    "Dinov2WithRegistersLayer": _DINOV2_LAYER,
}

_classes: dict[str, type] = {}


def library_class(name: str) -> type | None:
    """The class of timm or transformers that CLASSES lists; None where its library is not loaded or has it no more.

    Imports nothing. Where its module is loaded and the class is not in it, one line of the log says so.
    """
    found = _classes.get(name)
    if found is not None:
        return found
    loaded = [sys.modules[home] for home in CLASSES[name] if home in sys.modules]
    for home in loaded:
        kind = getattr(home, _NAME_THERE.get(name, name), None)
        if isinstance(kind, type):
            _classes[name] = kind
            return kind
    if loaded:
        homes = " or ".join(CLASSES[name])
        _log_lost(_described(name), f"{_library(name)} has none in {homes}; modules are called as they are")
    return None


def changed_forward(kind: Any, name: str) -> str:
    """How the forward of the class differs from all that are known of ``name``, and one line of the log; "" if it does
    not, or nothing is known. What somebody put in the place of its forward differs as well, unless it computes with
    the same names."""
    if name not in _READS:
        return ""
    new = sorted(names_read(inspect.unwrap(kind.forward).__code__) - set(_READS[name].split()))
    if not new:
        return ""
    detail = f"in {_library(name)} its forward reads {', '.join(new)}, which is not known here; it is called as it is"
    _log_lost(_described(name), detail)
    return detail


@functools.cache
def names_read(code: types.CodeType) -> frozenset[str]:
    """The attributes, functions and modules that a function and those within it mention."""
    inner = (names_read(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def is_exactly(module: Any, *names: str) -> bool:
    """Whether the module is of one of these classes, not of a subclass, and that computes what is known of it."""
    kind = type(module)
    return any(kind is library_class(name) and not changed_forward(kind, name) for name in names)


def _described(name: str) -> str:
    return f"{CLASSES[name][0].partition('.')[0]}'s {_NAME_THERE.get(name, name)}"


def _library(name: str) -> str:
    library = CLASSES[name][0].partition(".")[0]
    return f"{library} {installed(library)}"


def installed(distribution: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


PACKAGE = installed("idlevit-kernels") or "0+unknown"  # the latter in a source tree that is not installed


def libraries() -> dict[str, dict[str, Any]]:
    """What is installed of FLOORS, the floor, and whether it is older than that, which nobody has tested."""
    known = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    found = {name: known.get(name) or installed(name) for name in FLOORS}
    return {
        name: {"installed": has, "floor": FLOORS[name], "too_old": bool(has) and _numbers(has) < _numbers(FLOORS[name])}
        for name, has in found.items()
    }


def _numbers(version: str | None) -> tuple[int, ...]:
    """(2, 9, 1) of "2.9.1+cu128" and of "2.9.1rc2"."""
    digits = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, digits[0].split("."))) if digits else ()


# What is on


def report() -> list[Gate]:
    """Every gate, for ``idlevit info``. Imports timm, transformers and Triton where they are installed."""
    found = list(_gates)
    for name, reason, private in (
        ("oneDNN's linear layer", onednn_reason(), "_linear_pointwise"),
        ("packed weights of oneDNN", onednn_pack_reason(), "_reorder_linear_weight"),
    ):
        detail = f"{reason}; F.linear is called" if reason else f"torch.ops.mkldnn.{private}"
        found.append(Gate(name, not reason, detail))
    if torch.version.cuda is None:
        found.append(Gate("current CUDA stream", False, "this PyTorch is built without CUDA"))
    try:
        triton_compiler()
        found.append(Gate("Triton's compiler without a GPU", True, f"triton {installed('triton')}"))
    except ImportError as error:
        found.append(Gate("Triton's compiler without a GPU", False, str(error)))
    return [*found, *(_library_gate(library) for library in ("timm", "transformers"))]


def _library_gate(library: str) -> Gate:
    names = [name for name, homes in CLASSES.items() if homes[0].startswith(library + ".")]
    what = f"formulas of {library}'s modules" if library == "timm" else f"layers of {library}"
    if importlib.util.find_spec(library) is None:
        return Gate(what, False, f"{library} is not installed")
    _import_all(home for name in names for home in CLASSES[name])
    found = {name: library_class(name) for name in names}
    missing = [_NAME_THERE.get(name, name) for name, kind in found.items() if kind is None]
    changed = [
        f"{_NAME_THERE.get(name, name)}: {changed_forward(kind, name)}"
        for name, kind in found.items()
        if kind is not None and name in _READS and changed_forward(kind, name)
    ]
    lost = [f"{library} {installed(library)} has no {', '.join(missing)} where it was"] if missing else []
    if lost or changed:
        return Gate(what, False, "; ".join(lost + changed))
    return Gate(what, True, f"all {len(names)} classes are as known, in {library} {installed(library)}")


def _import_all(modules: Iterable[str]) -> None:
    for module in set(modules):
        try:
            importlib.import_module(module)
        except ImportError as error:  # then its classes are missing, which the report tells
            _logger.info("%s cannot be imported: %s", module, error)
