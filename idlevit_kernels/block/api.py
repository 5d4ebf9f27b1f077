"""``idle_block`` and ``IdleBlock``: one block of a model with a share of its tokens idle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import versions
from ..errors import ArgumentTypeError, refuse_renamed, type_error, value_error
from ..ops import library as ops
from ..ops.backends import resolve
from ..ops.checks import IN_PLACE, check_counts, check_integer, check_tensor, check_writable
from ..ops.reference.token_cut_loss import ROW_WEIGHTS
from ..schedule import check_ratio, num_kept
from .chain import NO_TORCHSCRIPT, IdleOutput, all_kept, run, with_indices
from .context import Context
from .parts import Form, Parts, find_form, find_parts, form_of_kind
from .scoring import Scorer, Select, Selection, check_scorer, check_select

InPlace = bool | Literal["unseen"]

_RENAMED = {
    "cut": "return_cut='both' of IdleBlock.forward, which returns an IdleOutput",
    "rope": "context=Context(rope=...)",
}


@overload
def idle_block(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    *,
    scorer: Scorer = "auto",
    select: Select = "top",
    context: Context | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_indices: Literal[False] = False,
) -> Tensor: ...


@overload
def idle_block(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    *,
    scorer: Scorer = "auto",
    select: Select = "top",
    context: Context | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def idle_block(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    *,
    scorer: Scorer = "auto",
    select: Select = "top",
    context: Context | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_indices: bool = False,
    **renamed: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """One transformer block on the ``num_keep`` most relevant image tokens; the others idle.

    Equivalent PyTorch, with ``idx`` from the class token's mean attention logits:
    ``y = gather(x, idx); y = y + ls1(attn(norm1(y))); y = y + ls2(mlp(norm2(y))); scatter(x, idx, y)``.

    Args:
        x: tokens [B, T, C], prefix tokens first; a grid [B, H, W, C] for blocks that take one (Swin).
        block: of a kind that is known: timm's Block, EvaBlock, Swin and Twins blocks, transformers' ViT, DeiT and
            DINOv2 layers, and subclasses that keep their forward. All its modules may be others than the usual ones:
            what is not known is called.
        num_keep: K, 1 <= K <= N = T - num_prefix_tokens; of each window, in blocks with windows.
        num_prefix_tokens: P; prefix tokens never idle.
        scorer: "cls" (logits of the first token), "mean" (column mean of all logits), "auto" (cls if P > 0), "random",
            or a function of (x, block) that returns scores [B, T].
        select: "top" (the K largest scores), or a function of (image tokens [B, N, C], K) that returns the indices of
            those to compute, [B, K] int64 in [0, N).
        context: what belongs to the tokens beside their values: a rotary embedding, of which those of the kept tokens
            are gathered (then the real, rotated queries and keys score); the grid's size; for transformers' layers, a
            mask of pairs of tokens. A token that nothing sees is padding: it counts in N and is kept last.
        inplace: write the result into x. Everything that shares its memory changes; not while gradients are recorded.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        return_indices: also return the indices of the computed tokens, [B, P + K] int64, ascending.

    Returns:
        A tensor like x, or that and the indices. Rows of idle tokens equal those of x bit for bit.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        BackendError: a named backend cannot run the call.
    """
    op = "idle_block"
    refuse_renamed(op, renamed, _RENAMED)
    selection = Selection(check_scorer(op, scorer, num_prefix_tokens), check_select(op, select))
    check_integer(op, "num_keep", num_keep)
    context = context or Context.NOTHING
    out, _ = _compute(op, x, block, num_keep, num_prefix_tokens, selection, context, None, inplace, backend, None)
    if not return_indices:
        return out.tokens
    out = with_indices(out, num_prefix_tokens + num_keep)
    return out.tokens, out.indices


def _compute(
    op: str,
    x: Tensor,
    block: Any,
    keep: int | float,
    num_prefix_tokens: int,
    selection: Selection,
    context: Context,
    given: tuple[tuple[Any, ...], dict[str, Any]] | None,
    inplace: InPlace,
    backend: str,
    cut: str | None,
) -> tuple[IdleOutput, bool]:
    """The block on the K = ``keep`` (a count) or int(keep * N) (a ratio) best image tokens.

    Where all are kept and a part of the block is hooked or patched, the block's own forward computes it, with what it
    was ``given`` beside x (None: what the context says): only that makes the very calls that somebody waits for. Also
    returned: whether nobody else can hold the tokens, which is not known of those that the block's own forward made.
    """
    parts = find_parts(block)
    if isinstance(parts, str):
        if keep == 1.0 and type(keep) is float:
            args, named = given or ((), {})
            if inplace is True:
                _check_inplace(op, x, block, context)
            out = _own_forward(block)(x, *args, **named)
            return with_indices(all_kept(x, x.copy_(out) if inplace is True else out, cut), x.shape[1]), False
        raise ArgumentTypeError(f"{op}: block must be one that can idle, got {parts}")
    form = parts.form
    if num_prefix_tokens and not form.sequence:
        raise value_error(op, "num_prefix_tokens", "0 for a block whose tokens are a grid's", num_prefix_tokens)
    tokens, context, leave = (x, context, None) if form.alone is context else form.enter(block, x, context)
    _check_tokens(op, x, tokens, parts)
    if isinstance(keep, float):
        num_keep = num_kept(keep, tokens.shape[1] - num_prefix_tokens)
    else:
        num_keep = keep
        check_counts(op, tokens.shape[1], num_keep, num_prefix_tokens)
    if context is not Context.NOTHING:
        _check_context(op, context, parts, tokens, num_prefix_tokens)
    if inplace == "unseen":  # a norm that is called on all tokens, or a scorer, may hold them
        inplace = parts.norm1 is not None and parts.norm1.plain and not selection.own
    elif inplace:
        _check_inplace(op, x, block, context)
    if cut not in (None, "none") and parts.attention.cut_reason:
        expected = f"'none' or None here: {parts.attention.cut_reason}"
        raise ArgumentTypeError(f"{op}: return_cut must be {expected}, got {cut!r}")
    if num_keep == tokens.shape[1] - num_prefix_tokens and not parts.plain:
        args, named = given or ((), form.arguments(context))
        out = _own_forward(block)(x, *args, **named)
        out = x.copy_(out) if inplace else out
        return with_indices(all_kept(x, out, cut), tokens.shape[1]), False
    found = run(
        tokens, parts, num_keep, num_prefix_tokens, selection, context,
        inplace=bool(inplace) and leave is None, backend=resolve(backend, op), cut=cut,
    )  # fmt: skip
    if cut is not None:
        found = with_indices(found, tokens.shape[1])
    if leave is None:
        return found, True
    out = leave(found.tokens)
    return found._replace(tokens=x.copy_(out) if inplace else out), True


def _own_forward(block: Any) -> Any:
    """The forward of the block's class, of an idle block that of its dense class."""
    return (
        super(IdleBlock, block).forward
        if isinstance(block, IdleBlock)
        else functools.partial(type(block).forward, block)
    )


def _check_tokens(op: str, x: Tensor, tokens: Tensor, parts: Parts) -> None:
    weight = parts.attention.weight
    if type(tokens) is Tensor and weight is not None and tokens.dtype is weight.dtype and tokens.dim() == 3:
        if tokens.shape[2] == weight.shape[1] and tokens.device == weight.device:
            return
    check_tensor(op, "x", tokens, "[B, T, C]", (None, None, None))
    if weight is None:
        return
    if weight.shape[1] != tokens.shape[2]:
        raise value_error(op, "x", f"[B, T, C] with the block's C = {weight.shape[1]} channels", x)
    if weight.device != tokens.device:
        raise value_error(op, "x", f"on {weight.device}, where the block is", x)
    if weight.dtype != tokens.dtype and not torch.is_autocast_enabled(x.device.type):
        raise type_error(op, "x", f"of the block's dtype, {weight.dtype}, or under autocast", x)


def _check_context(op: str, context: Context, parts: Parts, tokens: Tensor, num_prefix_tokens: int) -> None:
    rope, mask = context.rope, context.mask
    if mask is not None:
        heads = getattr(parts.attention, "mask_heads", None)
        if heads is None:
            raise value_error(op, "context", "without a mask, which the block's attention does not take", mask)
        B, T = tokens.shape[:2]
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise type_error(op, "context.mask", "a boolean or float tensor [B or 1, H or 1, T, T]", mask)
        shapes = [(b, h, T, T) for b in (1, B) for h in (1, heads)]
        if mask.shape not in shapes:
            raise value_error(op, "context.mask", f"[{B} or 1, {heads} or 1, {T}, {T}]", mask)
    if rope is None:
        return
    unrotated = getattr(parts.attention, "num_prefix_tokens", None)
    if unrotated is None:
        expected = "without a rotary embedding, which the block's attention does not take"
        raise value_error(op, "context", expected, rope)
    if unrotated != num_prefix_tokens:
        expected = f"{unrotated}, as many as the block's attention does not rotate"
        raise value_error(op, "num_prefix_tokens", expected, num_prefix_tokens)
    dims = min(max(rope.dim(), 2), 4) if isinstance(rope, Tensor) else 2
    check_tensor(op, "context.rope", rope, "[..., N, D]", (None,) * dims)
    N = tokens.shape[1] - num_prefix_tokens
    if rope.shape[-2] != N:
        raise value_error(op, "context.rope", f"[..., N, D] with the N = {N} image tokens", rope)


def _check_inplace(op: str, x: Tensor, block: nn.Module, context: Context) -> None:
    check_writable(op, x, **{"context.rope": context.rope})
    for name, parameter in block.named_parameters():
        check_writable(op, x, **{f"block.{name}": parameter})
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        raise value_error(op, "inplace", IN_PLACE, True)


# The block of a model


@functools.cache
def _mixed(idle: type, kind: type, form: Form) -> type:
    """A class that is both: the dense block's, so that whoever looks for blocks by their class finds this one, and the
    idle block's. It has the dense class's name, by which device maps and wrap policies know it."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (idle, kind), {**names, "dense_kind": kind, "idle_kind": idle, "form": form})


def _rebuild(idle: Any, kind: Any) -> nn.Module:
    """An idle block without attributes, for copy and pickle."""
    form = form_of_kind(kind)
    if isinstance(form, str):
        raise ArgumentTypeError(f"IdleBlock: block must be one that can idle, got {form}")
    return object.__new__(_mixed(idle, kind, form))  # type: ignore[arg-type]


@dataclasses.dataclass
class Idling:
    """The settings of an idle block: a keep ratio or a count, and how tokens are chosen; ``layer`` as in
    ``IdleBlock``."""

    keep: int | float
    num_prefix_tokens: int
    selection: Selection
    layer: int | None = None


# What an idle block has of its own; the rest lies on the dense block, too.
_OWN = ("_idling", "_dense", "_parts")


class IdleBlock(nn.Module):
    """A transformer block that computes a share of its image tokens and lets the others idle.

    ``IdleBlock(block, 0.7)`` is an instance of IdleBlock and of the block's own class, with its modules, parameters,
    buffers, hooks and attributes, so state-dict keys do not change; ``dense_block`` gives the block back. K follows the
    number of image tokens of each input: K = int(keep_ratio * N), at least 1. It is called as the dense block is.

    Args:
        block: as in ``idle_block``, called and hooked as ever; not compiled by itself yet.
        keep_ratio: in (0, 1].
        num_prefix_tokens, scorer, select: as in ``idle_block``.
        num_keep: K itself, in place of a ratio.

    Raises:
        TypeError: the block cannot idle; the message gives the reason.
        ValueError: a setting out of range.
    """

    dense_kind: type
    idle_kind: type
    form: Form
    _idling: Idling

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if hasattr(cls, "dense_kind"):  # a copy, or a replica of DataParallel
            return object.__new__(cls)
        block = args[0] if args else kwargs.get("block")
        cls.check(block)
        return _rebuild(cls, type(block))

    def __init__(
        self,
        block: nn.Module,
        keep_ratio: float | None = None,
        num_prefix_tokens: int = 1,
        scorer: Scorer = "auto",
        *,
        select: Select = "top",
        num_keep: int | None = None,
    ):
        op = "IdleBlock"
        check_integer(op, "num_prefix_tokens", num_prefix_tokens)
        if num_prefix_tokens < 0:
            raise value_error(op, "num_prefix_tokens", "at least 0", num_prefix_tokens)
        if keep_ratio is not None and num_keep is not None:
            raise value_error(op, "num_keep", "None where keep_ratio is given (one of the two)", num_keep)
        keep = check_ratio(op, keep_ratio) if num_keep is None else check_count(op, num_keep)  # type: ignore[arg-type]
        scorer, select = check_scorer(op, scorer, num_prefix_tokens), check_select(op, select)
        self.__dict__.update(block.__dict__)
        self.__dict__["_idling"] = Idling(keep, num_prefix_tokens, Selection(scorer, select))
        self.__dict__["_dense"] = (block,)  # in a tuple, so that it is no sub-module
        found = find_parts(self)  # a compiler knows the classes that were met before
        if isinstance(found, str):
            raise ArgumentTypeError(f"{op}: block must be one that can idle, got {found}")

    @staticmethod
    def check(block: Any) -> None:
        """Raises TypeError, with the reason, if the block is not one that can idle."""
        if isinstance(block, IdleBlock):
            raise type_error("IdleBlock", "block", "dense; take its dense_block() first", block)
        form = find_form(block)
        if isinstance(form, str):
            raise ArgumentTypeError(f"IdleBlock: block must be one that can idle, got {form}")

    # Settings

    @property
    def keep_ratio(self) -> float | None:
        """The share of image tokens that it computes; None where ``num_keep`` says how many."""
        keep = self._idling.keep
        return keep if isinstance(keep, float) else None

    @keep_ratio.setter
    def keep_ratio(self, ratio: float) -> None:
        self._idling.keep = check_ratio("IdleBlock", ratio)

    @property
    def keep(self) -> int | float:
        """The keep ratio, a float; or the number of image tokens that it computes, an int."""
        return self._idling.keep

    @keep.setter
    def keep(self, keep: int | float) -> None:
        ratio = isinstance(keep, float)
        self._idling.keep = check_ratio("IdleBlock", keep) if ratio else check_count("IdleBlock", keep)  # type: ignore[arg-type]

    @property
    def layer(self) -> int | None:
        """Which of its encoder's blocks it is, from 0; None if it was not made by ``apply_idle``."""
        return self._idling.layer

    @layer.setter
    def layer(self, layer: int | None) -> None:
        self._idling.layer = layer

    @property
    def num_prefix_tokens(self) -> int:
        return self._idling.num_prefix_tokens

    @property
    def scorer(self) -> Any:
        return self._idling.selection.scorer

    @property
    def select(self) -> Any:
        return self._idling.selection.select

    @property
    def idles(self) -> bool:
        """Whether image tokens may idle: its keep ratio is below 1, or it has a count."""
        return self._idling.keep != 1.0 or isinstance(self._idling.keep, int)

    # Calls

    @overload
    def forward(
        self, x: Tensor, *args: Any, inplace: bool = False, return_cut: None = None, **kwargs: Any
    ) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *args: Any, inplace: bool = False, return_cut: str, **kwargs: Any) -> IdleOutput: ...

    def forward(
        self, x: Tensor, *args: Any, inplace: bool = False, return_cut: str | None = None, **kwargs: Any
    ) -> Tensor | IdleOutput:
        """What the dense block takes and returns; with ``return_cut`` an ``IdleOutput``.

        Args:
            x, args, kwargs: as the dense block takes them.
            inplace: write into x, as in ``idle_block``.
            return_cut: for training, the kind of token cut loss to compute, as in ``token_cut_loss``: "both", "inter",
                "intra"; "none" is 0 at no cost. A keyword of the call, so that hooks and wrappers see it.
        """
        op = "IdleBlock"
        if return_cut is not None and return_cut not in ROW_WEIGHTS:
            raise value_error(op, "return_cut", f"one of {list(ROW_WEIGHTS)}", return_cut)
        if "cut" in kwargs:
            refuse_renamed(op, {"cut": kwargs["cut"]}, _RENAMED)
        idling, context = self._idling, self.form.alone
        if args or kwargs or context is None:
            context = self.form.context(self, *args, **kwargs)
        out, _ = _compute(
            op, x, self, idling.keep, idling.num_prefix_tokens, idling.selection, context, (args, kwargs), inplace,
            "auto", return_cut,
        )  # fmt: skip
        return out.tokens if return_cut is None else out

    def step(self, x: Tensor, owned: bool) -> tuple[Tensor, bool]:
        """The output for x, and whether nobody else can hold it. If that is so of x (``owned``), it is written into x,
        unless a module is given x itself."""
        idling = self._idling
        out, owned = _compute(
            "IdleBlock", x, self, idling.keep, idling.num_prefix_tokens, idling.selection, Context.NOTHING, ((), {}),
            "unseen" if owned and self.idles else False, "auto", None,
        )  # fmt: skip
        return out.tokens, owned

    def watched(self) -> bool:
        """Whether a hook, ``compile()``, a replaced or overridden forward or __call__ sees its input or output."""
        kind: Any = type(self)
        return (
            getattr(kind.forward, "__code__", None) is not _FORWARD
            or kind.__call__ is not _CALL
            or versions.has_hooks(self)
            or versions.compiled_in_place(self)
            or "forward" in self.__dict__
        )

    def dense_block(self) -> nn.Module:
        """The block this was made from, with the present modules, parameters, buffers, hooks and attributes.

        Raises:
            RuntimeError: forward was replaced on the idle block since; what replaced it would go on to call this one.
        """
        self.check_removable("dense_block")
        return give_back(self, self.dense_kind, _OWN)

    def check_removable(self, op: str) -> None:
        if "forward" in self.__dict__:
            raise RuntimeError(
                f"{op}: the forward of an idle block was replaced on the object (by accelerate's hooks, say), and what"
                " replaced it would go on to call the idle block: take it off first"
            )

    # What copies, prints and swaps

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.idle_kind, self.dense_kind), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return {**state, "_idling": dataclasses.replace(self._idling)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and not issubclass(value, type(self)):
            raise ArgumentTypeError(
                f"IdleBlock: __class__ must become a subclass of {type(self).__name__} as it is, got {value.__name__}:"
                " the block would silently stop idling. Call remove_idle first."
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(NO_TORCHSCRIPT)

    def _get_name(self) -> str:
        return f"Idle{self.dense_kind.__name__}"

    def extra_repr(self) -> str:
        idling, base = self._idling, super().extra_repr()
        keep = f"keep_ratio={idling.keep:g}" if isinstance(idling.keep, float) else f"num_keep={idling.keep}"
        own = f"{keep}, num_prefix_tokens={idling.num_prefix_tokens}, scorer={self.scorer!r}"
        own += "" if self.select == "top" else f", select={self.select!r}"
        return f"{base}, {own}" if base else own


_FORWARD, _CALL = IdleBlock.forward.__code__, nn.Module.__call__  # as they stand here; both may be patched later


def check_count(op: str, num_keep: int) -> int:
    check_integer(op, "num_keep", num_keep)
    if num_keep < 1:
        raise value_error(op, "num_keep", "at least 1", num_keep)
    return num_keep


def take_place(new: nn.Module, old: nn.Module) -> None:
    """``new`` gets what lies on ``old``, but for the children that it has, and remembers it."""
    children = new._modules
    new.__dict__.update(old.__dict__)
    new.__dict__["_modules"] = children
    new.__dict__["_dense"] = (old,)


def give_back(new: nn.Module, kind: type, own: tuple[str, ...]) -> Any:
    """What ``new`` took the place of, with all that lies on ``new`` now; in a copy, which has no other, a new one."""
    old = new.__dict__.get("_dense", (None,))[0]
    if old is None:
        old = object.__new__(kind)
    attributes = {name: value for name, value in new.__dict__.items() if name not in own}
    attributes.pop(versions.COMPILED, None)  # it calls ``new``
    old.__dict__.clear()
    old.__dict__.update(attributes)
    return old


class IdleSequential(nn.Sequential):
    """Consecutive blocks. Idle ones write into the output of the idle block before them where nobody else can see it.

    That saves a copy of all idle tokens in each layer. A caller who runs the blocks one by one, as feature extraction
    does, or who hooks a block, gets a new tensor from each.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or versions.any_global_module_hook()
            or ops.transformed()
        ):
            return super().forward(x)
        owned = False  # x is a buffer that only this loop knows
        for block in self._modules.values():
            if isinstance(block, IdleBlock) and not block.watched():
                x, owned = block.step(x, owned)
            else:
                assert block is not None
                x, owned = block(x), False
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_dense"}

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(NO_TORCHSCRIPT)
