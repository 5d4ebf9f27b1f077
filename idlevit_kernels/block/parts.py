"""What a block consists of, looked up once and true as long as nothing that was looked at has changed.

A block's formula may stand in for its modules only while they are the library's own and nobody watches them. So each
value is read through a ``Watch``, which remembers it, and the parts are used again while ``Watch.holds``: every module,
parameter, setting (eps, heads, dropout, mode) and hook is what it was. What cannot be replaced is called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from .. import versions
from ..errors import ArgumentTypeError, ArgumentValueError
from ..ops.backends import native
from ..ops.library import PLAIN, Calls
from .context import Context
from .linear import Linear, onednn_is_faster


def plain_tensor(value: Any) -> bool:
    """No subclass that brings operators of its own (quantised, distributed), no lazy minus sign; None counts as one.
    What a tracer puts in a parameter's place will do."""
    return value is None or is_compiling() or (type(value) in PLAIN and not value.is_neg())


# Is a forward the library's own? Its name and module do not tell: what replaces a function often copies them.


def _code(forward: Any) -> Any:
    """The code of a forward; that of the layer itself where transformers has wrapped it for gradient checkpointing."""
    code = getattr(forward, "__code__", None)
    while code is not None and code.co_name == "forward_with_checkpointing":
        home = sys.modules.get("transformers.modeling_layers")
        if home is None or code.co_filename != home.__file__:
            break
        forward = forward.__closure__[code.co_freevars.index("forward")].cell_contents
        code = getattr(forward, "__code__", None)
    return code


@functools.cache
def _is_own(kind: type, forward: Any) -> bool:
    base, code = definer(kind), _code(forward)
    if code is None or code.co_filename != getattr(sys.modules.get(base.__module__), "__file__", None):
        return False
    qualified = getattr(code, "co_qualname", None)  # since Python 3.11
    if qualified is not None:
        return qualified == f"{base.__qualname__}.forward"
    lines, first = inspect.getsourcelines(base)
    return code.co_name == "forward" and first <= code.co_firstlineno < first + len(lines)


def own_forward(kind: type) -> bool:
    """Whether ``kind.forward`` is the one that stands in the source of the class that defines it."""
    return is_compiling() or _is_own(kind, kind.forward)  # type: ignore[attr-defined]


_TORCH_KINDS: dict[str, type] = {
    "Dropout": nn.Dropout,
    "GELU": nn.GELU,
    "Identity": nn.Identity,
    "Linear": nn.Linear,
    "Softmax": nn.Softmax,
    "torch.LayerNorm": nn.LayerNorm,
}


_names = {kind: name for name, kind in _TORCH_KINDS.items()}  # of the classes that were met


def find_kind(name: str) -> type | None:
    """The class of torch, or of a library that is loaded, by the name it has in ``versions.CLASSES``."""
    return _TORCH_KINDS.get(name) or versions.library_class(name)


def kind_name(kind: type, names: tuple[str, ...]) -> str | None:
    """Which of these classes this is. A compiler only finds what was met before, as in ``IdleBlock.__init__``."""
    found = _names.get(kind)
    if found is None and not is_compiling():
        found = next((name for name in names if find_kind(name) is kind), None)
        if found is None or versions.changed_forward(kind, found):
            return None
        _names[kind] = found
    return found


class Watch:
    """Reads a block and remembers what it saw.

    Attributes:
        disturbed: whether a part that was looked at is hooked, patched or compiled by itself: then a dense layer is
            left to the block's own forward.
    """

    def __init__(self) -> None:
        self.disturbed = False
        self._recording = not is_compiling()  # a compiled graph has guards of its own
        self._global_hooks = self._recording and bool(versions.any_global_module_hook())
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[Any] = []
        self._modules: list[nn.Module] = []
        self._kinds: dict[type, None] = {}

    def value(self, module: Any, name: str, default: Any = None) -> Any:
        """The module's attribute: a setting, a part, a parameter or a buffer."""
        if self._recording:
            attributes = module.__dict__
            places = [attributes["_parameters"], attributes["_buffers"], attributes["_modules"], attributes]
            for place in [p for p in places if name in p] or places[2:]:
                self._remember(place, name)
        return getattr(module, name, default)

    def _remember(self, place: dict[str, Any], name: str) -> None:
        self._places.append(place)
        self._names.append(name)
        self._values.append(place.get(name))

    def visit(self, module: nn.Module) -> None:
        """Notices when the module gets another class, when its class gets another forward, when somebody hooks it."""
        if not self._recording or any(module is seen for seen in self._modules):
            return
        self._modules.append(module)
        self._kinds[type(module)] = None
        for name in ("forward", versions.COMPILED):
            self._remember(module.__dict__, name)
        self._hooks += [module.__dict__[name] for name in versions.WATCHING_HOOKS if name in module.__dict__]

    def visit_kind(self, kind: type) -> None:
        """Notices when the class gets another forward."""
        self._kinds[kind] = None

    def is_a(self, module: Any, *names: str) -> bool:
        """Exactly of one of these classes, with its own forward: its formula is known. It may be hooked."""
        known, own = kind_name(type(module), names) in names, self.is_own(module)
        return known and own

    def is_own(self, module: Any) -> bool:
        """Whether its forward is the one in the source of its class."""
        self.visit(module)
        own = own_forward(type(module)) and "forward" not in module.__dict__
        self.disturbed |= not own
        return own

    def is_watched(self, module: nn.Module) -> bool:
        """Whether somebody waits to see it called: a hook, a hook on all modules, ``module.compile()``."""
        self.visit(module)
        watched = bool(self._global_hooks or versions.has_hooks(module) or versions.compiled_in_place(module))
        watched |= not is_compiling() and type(module).__call__ is not _CALL
        self.disturbed |= watched
        return watched

    def is_plain(self, module: Any, *names: str) -> bool:
        """Of one of these classes, its forward its own, and nobody watches: it may be replaced by its formula."""
        known, watched = self.is_a(module, *names), self.is_watched(module)
        return known and not watched

    def seal(self) -> None:
        """After the last look."""
        empty, filled = ([hooks for hooks in self._hooks if bool(hooks) is full] for full in (False, True))
        kinds = [kind for kind in self._kinds for _ in _CALLED]
        called = [name for _ in self._kinds for name in _CALLED]
        functions = list(map(getattr, kinds, called))
        types = list(map(type, self._modules))
        self._record: Record = (
            self._places, self._names, self._values, empty, filled, self._modules, types, kinds, called, functions
        )  # fmt: skip
        self._unchanged = getattr(native.extension(), "unchanged", unchanged)

    def holds(self) -> bool:
        """Whether all is as it was."""
        return self._unchanged(self._record) and bool(versions.any_global_module_hook()) == self._global_hooks


Record = tuple[
    list[dict[str, Any]], list[str], list[Any], list[Any], list[Any],
    list[nn.Module], list[type], list[type], list[str], list[Any],
]  # fmt: skip
"""Places, names and values: what stood in which dict, None for what did not; hooks: dicts that were empty, dicts that
were not; modules and their types; classes, names and functions: which forward and __call__ a class had."""


def unchanged(record: Record) -> bool:
    """Whether all is as the record says. The native extension has the same function, eight times as fast."""
    places, names, values, empty, filled, modules, types, kinds, called, functions = record
    return (
        all(map(operator.is_, map(dict.get, places, names), values))
        and not any(empty)
        and all(filled)
        and all(map(operator.is_, map(type, modules), types))
        and all(map(operator.is_, map(getattr, kinds, called), functions))
    )


_CALLED = ("forward", "__call__")
_CALL = nn.Module.__call__  # as it stands here; it may be patched later


# What the parts are


# This and what else is called are no named tuples: the compiler of PyTorch 2.10 cannot call one that holds a module.


@dataclasses.dataclass(eq=False)
class Norm:
    """A norm over channels.

    Attributes:
        module: the norm itself.
        parameters: weight, bias, eps, if it equals ``F.layer_norm`` with statistics in the accumulate type.
        plain: whether those stand in for it.
        casts: whether it computes in float32 whatever comes.
    """

    module: Any
    parameters: tuple[Tensor | None, Tensor | None, float] | None
    plain: bool
    casts: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.plain or self.casts or self.parameters is None:
            return self.module(x)
        weight, bias, eps = self.parameters
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def read(self) -> Norm:
        """The same, by its parameters if they can be read, whoever watches the module."""
        return Norm(self.module, self.parameters, self.parameters is not None, self.casts)


def find_norm(module: Any, watch: Watch) -> Norm:
    known = watch.is_a(module, "torch.LayerNorm", "LayerNorm", "LayerNormFp32")
    watched = watch.is_watched(module)
    if not known:
        return Norm(module, None, False)
    weight, bias, eps = (watch.value(module, name) for name in ("weight", "bias", "eps"))
    readable = plain_tensor(weight) and plain_tensor(bias) and not made_by_a_hook(module)
    if len(watch.value(module, "normalized_shape")) != 1 or not readable:
        return Norm(module, None, False)
    return Norm(module, (weight, bias, eps), not watched, type(module) is find_kind("LayerNormFp32"))


def made_by_a_hook(module: nn.Module) -> bool:
    """Whether a weight or bias is no parameter, but made at each call by a hook (torch.nn.utils.prune, weight_norm)."""
    return not is_compiling() and any(name in module.__dict__ for name in ("weight", "bias"))


def find_linear(module: Any, watch: Watch) -> Linear:
    """A projection [in] -> [out]; any module will do."""
    known, watched = watch.is_a(module, "Linear"), watch.is_watched(module)
    if not known:
        return Linear(module, None, None, False)
    weight, bias = watch.value(module, "weight"), watch.value(module, "bias")
    if weight is None or made_by_a_hook(module) or not (plain_tensor(weight) and plain_tensor(bias)):
        return Linear(module, None, None, False)
    return Linear(module, weight, bias, not watched, onednn_is_faster())


def find_optional(module: Any, watch: Watch) -> Any:
    """The module, or None if it returns its input and nobody waits to see it called: an Identity, a Dropout that
    drops nothing. Attention maps of timm come from hooks on a dropout."""
    if module is None or watch.is_plain(module, "Identity"):
        return None
    if watch.is_plain(module, "Dropout"):
        training, share = watch.value(module, "training"), watch.value(module, "p")
        return module if training and share else None
    if watch.is_plain(module, "DropPath") and not watch.value(module, "training"):
        return None
    return module


class Branch:
    """What happens to the output of attention or MLP before it is added to the tokens.

    Attributes:
        norm: of post-norm blocks, applied first.
        scale: a module that scales it (LayerScale) and has to be called.
        gamma, factor: LayerScale's [C] or None, and a number, that the fused kernels multiply with.
        drop: stochastic depth, or None.
        bare: whether there is nothing but gamma and factor.
    """

    def __init__(
        self, norm: Any = None, scale: Any = None, gamma: Tensor | None = None, factor: float = 1.0, drop: Any = None
    ):
        self.norm, self.scale, self.gamma, self.factor, self.drop = norm, scale, gamma, factor, drop
        self.bare = norm is None and scale is None and drop is None

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        """branch [rows, n, C]; gamma and factor are left to the caller. Stochastic depth leaves out whole images,
        each of which may be several rows (windows)."""
        if self.norm is not None:
            branch = self.norm(branch)
        if self.scale is not None:
            branch = self.scale(branch)
        if self.drop is not None:
            images = context.images(branch)
            branch = self.drop(branch.reshape(images, -1, branch.shape[2])).view_as(branch)
        return branch

    def add(self, tokens: Tensor, branch: Tensor, context: Context, owned: bool = False) -> Tensor:
        """tokens + the branch; written into the tokens if they are ``owned``."""
        if not self.bare:
            branch = self(branch, context)
        if self.gamma is not None:
            branch = self.gamma * branch
        if self.factor != 1.0:
            branch = branch * self.factor
        return tokens.add_(branch) if owned else tokens + branch


_DINOV2_DROPS = ("Dinov2DropPath", "Dinov2WithRegistersDropPath")
_DINOV2_SCALES = ("Dinov2LayerScale", "Dinov2WithRegistersLayerScale")


def find_branch(
    watch: Watch, drop: Any = None, scale: Any = None, gamma: Tensor | None = None, norm: Any = None
) -> Branch:
    """From DropPath, and LayerScale as a module or a parameter [C].

    DropPath multiplies whole images and LayerScale whole channels, so their order does not matter; where another
    module drops, LayerScale is called before it.
    """
    drop = find_optional(drop, watch)
    commutes = drop is None or watch.is_plain(drop, "DropPath", "Dropout", *_DINOV2_DROPS)
    if gamma is not None:
        if commutes and plain_tensor(gamma):
            return Branch(norm, None, gamma, 1.0, drop)
        return Branch(norm, functools.partial(torch.mul, gamma), None, 1.0, drop)
    scale = find_optional(scale, watch)
    if scale is None or not commutes:
        return Branch(norm, scale, None, 1.0, drop)
    if watch.is_plain(scale, "LayerScale", *_DINOV2_SCALES):
        gamma = watch.value(scale, "gamma" if hasattr(scale, "gamma") else "lambda1")
        if plain_tensor(gamma):
            return Branch(norm, None, gamma, 1.0, drop)
    elif watch.is_plain(scale, "Scale"):
        return Branch(norm, None, None, watch.value(scale, "factor"), drop)
    return Branch(norm, scale, None, 1.0, drop)


class Attention(Protocol):
    """Attention among tokens of which all, or only the kept ones, are given. One class a form, not a model.

    ``normed`` [B, T, C] is what the block's first norm makes of all tokens, ``y`` [B, n, C] of the kept ones.
    """

    cut_reason: str  # why there is no token cut loss; "" if there is one

    @property
    def weight(self) -> Tensor | None:
        """[out, C] of its first projection; None if its formula is not known."""

    def front(self, scorer: str, context: Context) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of one projection of queries, keys and values, if the fused op may score with them and
        nothing else is needed of all tokens."""

    def direction(self, scorer: str, context: Context, queries: Callable[[], Tensor]) -> Tensor | None:
        """u [B, C], whose dot product with a normalised token scores it; None where keys are not linear in tokens.
        ``queries()`` gives the normalised class token or the mean token, [B, C]."""

    def needs_all(self, context: Context) -> bool:
        """Whether scoring, or attention itself, wants something of all tokens that is to be computed once."""

    def prepare(self, normed: Tensor, context: Context) -> Any:
        """That something: queries and keys of all tokens, pooled keys."""

    def scores(self, normed: Tensor, prepared: Any, scorer: str, context: Context) -> Tensor:
        """[B, T], as the block's own logits rank the tokens."""

    def cut(self, prepared: Any, indices: Tensor, num_prefix_tokens: int, kind: str, calls: Calls) -> Tensor:
        """The token cut loss, a scalar."""

    def among(self, y: Tensor, prepared: Any, indices: Tensor, context: Context, calls: Calls) -> Tensor:
        """Attention of the kept tokens [B, n, C], from what was prepared of all. ``context`` is that of the kept."""

    def __call__(self, y: Tensor, context: Context) -> Tensor:
        """Attention of the tokens y, [B, n, C]."""


class Parts:
    """What a block consists of: x + branch1(attention(norm1(x))), then x + branch2(mlp(norm2(x))).

    Attributes:
        norm1, norm2: None where attention or MLP read the tokens as they are (post-norm blocks).
        watch, form: what read the block, and knows how it is called.
        plain: nothing in the block is hooked, patched or compiled by itself.
    """

    def __init__(
        self,
        norm1: Norm | None,
        attention: Attention,
        branch1: Branch,
        norm2: Norm | None,
        mlp: Callable[[Tensor], Tensor],
        branch2: Branch,
        watch: Watch,
        form: Any,
    ):
        self.norm1, self.attention, self.branch1 = norm1, attention, branch1
        self.norm2, self.mlp, self.branch2 = norm2, mlp, branch2
        self.watch = watch
        self.form: Form = form
        self.plain = not watch.disturbed
        self.block: Callable[[], nn.Module | None] = lambda: (
            None
        )  # set by ``find_parts``; weak, for it is kept by block


# How a kind of block is read and called


# A block's input as the chain takes it: tokens [B, T, C], their context, what makes the block's output of the chain's.
Entered = tuple[Tensor, Context, Callable[[Tensor], Tensor] | None]


class Form(Protocol):
    """How blocks of one kind are read and called. A family of models has one or more; derive from this class to have
    what is usual: a block that is called with tokens alone.

    Attributes:
        kinds: the classes of the blocks; those of a library that may not be loaded by the names that they have in
            ``versions.CLASSES``. Their forward, and that of a subclass that keeps it, is the one that the form knows.
        sequence: whether a block takes tokens [B, T, C], so that the kept ones make an input, too.
        alone: the context of a call with x alone; None if ``context`` has to be asked.
    """

    kinds: tuple[str | type, ...]
    sequence: bool = True
    alone: Context | None = Context.NOTHING

    def why_unsupported(self, block: Any) -> str | None:
        """Why the block cannot idle, beyond its class and forward; None if it can."""
        return None

    def parts(self, block: Any, watch: Watch) -> Parts:
        """What the block consists of, every attribute read through the watch."""
        ...

    def context(self, block: Any, *args: Any, **kwargs: Any) -> Context:
        """From what the block is called with after x."""
        if args or kwargs:
            got = ", ".join([*(f"a {type(a).__name__}" for a in args), *kwargs])
            raise ArgumentTypeError(
                f"IdleBlock: {type(block).__name__} must be called with its tokens alone, got {got} too"
            )
        return Context.NOTHING

    def arguments(self, context: Context) -> dict[str, Any]:
        """What the block's own forward is called with after x."""
        return {}

    def enter(self, block: Any, x: Tensor, context: Context) -> Entered:
        """The block's input as the chain takes it."""
        return x, context, None


# By class, or its name. Of a class that was given, the forward that it had then: its source may be in no file.
_forms: dict[str | type, Form] = {}
_forwards: dict[type, Any] = {}


def register_form(form: Form) -> None:
    """Raises ValueError if one of its classes has a form already, or a forward that is another's."""
    for kind in form.kinds:
        reason = _why_no_kind(kind)
        if reason:
            name = kind if isinstance(kind, str) else kind.__name__
            raise ArgumentValueError(f"register_family: {name} must be {reason}")
    for kind in form.kinds:
        _forms[kind] = form
        if isinstance(kind, type):
            _forwards[kind] = getattr(kind, "forward", None)
    _form.cache_clear()


def _why_no_kind(kind: str | type) -> str | None:
    if isinstance(kind, str) and kind not in versions.CLASSES:
        return "a class itself; only those that versions.CLASSES lists go by a name"
    if kind in _forms or (isinstance(kind, type) and any(_class(k) is kind for k in _forms)):
        return "a class whose blocks are not known yet, got one that is"
    if isinstance(kind, type) and "forward" not in vars(kind):
        return f"the class in which the forward is written, got one that inherits it: name {definer(kind).__name__}"
    return None


def forget_form(form: Form) -> None:
    for kind in form.kinds:
        del _forms[kind]
        if isinstance(kind, type):
            del _forwards[kind]
    _form.cache_clear()
    _known.clear()


def dense_kind(block: nn.Module) -> Any:
    """The block's class; of an idle block, the class that it was before."""
    return getattr(type(block), "dense_kind", type(block))


def definer(kind: type) -> Any:
    """The class in whose source the forward of ``kind`` stands."""
    return next((base for base in kind.__mro__ if "forward" in vars(base)), kind)


@functools.cache
def _form(kind: type, forward: Any) -> Form | str:
    """The form of the blocks of a class; or why there is none."""
    home = definer(kind)
    known = next((k for k in _forms if _class(k) is home), None)
    if known is None:
        for base in kind.__mro__[1:]:
            if any(_class(k) is base for k in _forms):
                return f"{kind.__name__}, whose forward is not that of {base.__name__}"
        return _REFUSED.get(kind.__name__) or f"{kind.__name__} ({kind.__module__}), whose forward is not known"
    if isinstance(known, str):
        own, changed = _is_own(kind, forward), versions.changed_forward(kind, known)
    else:
        own, changed = forward is _forwards[known], ""
    if not own:
        return f"{kind.__name__}, whose forward was replaced on the class"
    if changed:
        return f"{kind.__name__}, whose forward is not the one that is known: {changed}"
    return _forms[known]


def _class(kind: str | type) -> type | None:
    return find_kind(kind) if isinstance(kind, str) else kind


_POST_NORM = "it normalises after the branch (post-norm), so a kept token's branch input is not normalised"
_IN_PARALLEL = "it computes attention and MLP in parallel from one norm"
_REFUSED = {
    "ResPostBlock": f"ResPostBlock: {_POST_NORM}",
    "EvaBlockPostNorm": f"EvaBlockPostNorm: {_POST_NORM}",
    "ParallelScalingBlock": f"ParallelScalingBlock: {_IN_PARALLEL}",
    "DiffParallelScalingBlock": f"DiffParallelScalingBlock: {_IN_PARALLEL}",
    "ParallelThingsBlock": "ParallelThingsBlock: it holds several attentions and MLPs in parallel",
}


def form_of_kind(kind: type) -> Form | str:
    """The form of the blocks of a class; or why there is none."""
    return _form(kind, getattr(kind, "forward", None))


def find_form(block: Any) -> Form | str:
    """The form of the block, or why it cannot idle."""
    if not isinstance(block, nn.Module):
        return f"{type(block).__name__}, which is no module"
    kind = dense_kind(block)
    form = form_of_kind(kind)
    if isinstance(form, str):
        return form
    if kind is type(block) and "forward" in block.__dict__:
        return f"{kind.__name__}, whose forward was replaced on the object (take off accelerate's hooks, if it is them)"
    if kind is type(block) and versions.compiled_in_place(block):
        return f"{kind.__name__} that is compiled by itself; call apply_idle first, then block.compile()"
    return form.why_unsupported(block) or form


_known: weakref.WeakKeyDictionary[nn.Module, Parts] = weakref.WeakKeyDictionary()


def find_parts(block: Any) -> Parts | str:
    """The block's parts, looked up again when something has changed; or why the block cannot idle."""
    compiling = is_compiling()
    if not compiling:
        own = block.__dict__.get("_parts") if hasattr(type(block), "dense_kind") else None
        known = own or (_known.get(block) if isinstance(block, nn.Module) else None)
        if known is not None and known.watch.holds() and known.block() is block:
            return known
    form = block.form if compiling and hasattr(type(block), "form") else find_form(block)
    if isinstance(form, str):
        return form
    watch = Watch()
    watch.visit_kind(dense_kind(block))
    parts = form.parts(block, watch)
    parts.block = (lambda: block) if compiling else weakref.ref(block)
    if compiling:
        return parts
    watch.seal()
    if hasattr(type(block), "dense_kind"):  # where an idle block and its parts refer to each other, both can be freed
        block.__dict__["_parts"] = parts
    else:
        _known[block] = parts
    return parts
