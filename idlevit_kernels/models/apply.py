"""``apply_idle`` and ``remove_idle`` for every model family that a module here describes.

Such a module has a NAME and registers the form of its blocks (see ``block.parts``); ``find``, what holds the blocks in
a model, or None; ``blocks``, all of them in the order they run, whatever stages they lie in; ``set_blocks``;
``num_prefix_tokens``; ``default_scorer``; perhaps ``why_not``, why a block's place in such a model rules idling out,
and ``unset_blocks``, what is to be undone beside the blocks. A family whose image tokens stay one sequence from the
first block to the last can be trained if it has ``embed``, images to the tokens of the first block and the keyword
arguments of each block, and ``head``, tokens of the last block to logits and features (those of ``IdleViTOutput``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from ..block import IdleBlock
from ..block.api import check_count
from ..block.latency import slower_than_dense
from ..block.parts import find_form
from ..block.scoring import Scorer, Select, check_scorer, check_select
from ..errors import ArgumentTypeError, Words, refuse_renamed, type_error, value_error
from ..ops.checks import check_integer
from ..ops.flops import register_flop_formulas
from ..schedule import check_ratio, check_schedule, idle_schedule
from ..versions import library_class
from . import eva, huggingface, swin, twins, vit
from .inputs import block_inputs

Model = TypeVar("Model", bound=nn.Module)

FAMILIES = (vit, eva, swin, twins, huggingface)

_RENAMED = {
    "adaptive": "adaptive_batch=N, the batch size for which idling has to pay",
    "batch": "adaptive_batch=N",
}
# Models in which no block can idle, whatever its form.
_POOR_FITS = {
    "PyramidVisionTransformerV2": "its MLP mixes neighbours by a depthwise convolution, so no token can be computed"
    " without those around",
}


def idle_blocks(model: nn.Module) -> dict[str, IdleBlock]:
    """The blocks whose image tokens may idle (keep ratio below 1) by name, in order; empty for a dense model."""
    if not isinstance(model, nn.Module):
        raise type_error("idle_blocks", "model", "a torch.nn.Module", model)
    return {name: m for name, m in model.named_modules() if isinstance(m, IdleBlock) and m.idles}


def apply_idle(
    model: Model,
    keep_ratio: float | None = None,
    schedule: Sequence[float] | None = None,
    *,
    num_keep: Sequence[int | None] | None = None,
    scorer: Scorer = "auto",
    select: Select = "top",
    adaptive_batch: int | None = None,
    **renamed: Any,
) -> Model:
    """Makes a dense model an IdleViT: swaps its blocks for idle ones, in place, and returns it.

    Weights, state-dict keys and the model's interface stay as they are; ``remove_idle`` undoes it. Layers whose ratio
    is 1 compute all tokens. Call it before ``torch.compile``, DistributedDataParallel or FSDP.

    Args:
        model: a timm model of a supported family (VisionTransformer, Eva, SwinTransformer, ...) or its
            ``features_only`` form; a transformers ViT, DeiT or DINOv2, or a model that holds one.
        keep_ratio: r in (0, 1], 0.7 if nothing is given; the layers get ``idle_schedule(depth, r)``. The layers of a
            pyramid count through all its stages: its early, wide ones are the dense quarter.
        schedule: instead, one ratio for each layer, 1.0 for dense.
        num_keep: instead, how many image tokens each layer computes, None for dense; of each window in a pyramid of
            windows.
        scorer: "cls", "mean" or "auto": the class token where the model has one, else the column mean; "random"; or a
            function of (x [B, T, C], block) that returns scores [B, T].
        select: "top", the largest scores; or a function of (image tokens [B, N, C], K) that returns the indices of
            those to compute, [B, K] int64.
        adaptive_batch: leave dense the layers in which idling does not pay on the model's device, in its dtype, at
            this number of images. Idling saves arithmetic and costs a few calls: a small batch on a large GPU can be
            faster dense. Each kind of layer is timed, idle and dense, at inference on images of the model's own size;
            it takes a second or two. The result differs from machine to machine, and from run to run where it hardly
            matters: to fix it, keep ``idle_config(model)``, or a schedule of ``idlevit tune``.

    Raises:
        TypeError: the model is of no supported family, or has blocks that cannot idle; the message gives the reason.
        ValueError: a ratio, count or schedule that does not fit, or a model that is idle already.
        The model is unchanged if anything is raised.
    """
    op = "apply_idle"
    refuse_renamed(op, renamed, _RENAMED)
    family, found = find_family(op, model)
    blocks = family.blocks(found)
    if adaptive_batch is not None:
        check_integer(op, "adaptive_batch", adaptive_batch)
        if adaptive_batch < 1:
            raise value_error(op, "adaptive_batch", "at least 1", adaptive_batch)
    if any(isinstance(block, IdleBlock) for block in blocks):
        got = Words(f"a model with {len(idle_blocks(model))} idle blocks")
        raise value_error(op, "model", "dense; call remove_idle first", got)
    keeps = _keeps(op, len(blocks), keep_ratio, schedule, num_keep)
    prefix = family.num_prefix_tokens(found)
    scorer = check_scorer(op, family.default_scorer(found) if scorer == "auto" else scorer, prefix)
    select = check_select(op, select)
    idle = [make_idle(block, keep, prefix, scorer, select) for block, keep in zip(blocks, keeps, strict=True)]
    if adaptive_batch is not None:
        slower = slower_than_dense(idle, blocks, block_inputs(model, blocks, adaptive_batch))
        for block, slow in zip(idle, slower, strict=True):
            if slow:
                block.keep = 1.0
    register_flop_formulas()  # before the user makes a counter
    _leave_whole_in_fx()
    family.set_blocks(found, idle)
    return model


def make_idle(block: nn.Module, keep: int | float, num_prefix_tokens: int, scorer: Any, select: Any) -> IdleBlock:
    """``keep``: a ratio if it is a float, a count if it is an int."""
    how: dict[str, Any] = {"keep_ratio": keep} if isinstance(keep, float) else {"num_keep": keep}
    return IdleBlock(block, num_prefix_tokens=num_prefix_tokens, scorer=scorer, select=select, **how)


def _keeps(
    op: str,
    depth: int,
    keep_ratio: float | None,
    schedule: Sequence[float] | None,
    num_keep: Sequence[int | None] | None,
) -> list[int | float]:
    """A ratio (float) or a count (int) for each layer."""
    given = {"keep_ratio": keep_ratio, "schedule": schedule, "num_keep": num_keep}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise value_error(op, named[1], f"None where {named[0]} is given (one of the two)", given[named[1]])
    if num_keep is not None:
        if isinstance(num_keep, str) or not isinstance(num_keep, Sequence):
            raise type_error(op, "num_keep", f"a sequence of {depth} counts, None for a dense layer", num_keep)
        if len(num_keep) != depth:
            expected = f"one count for each of the {depth} layers, None for a dense one"
            raise value_error(op, "num_keep", expected, Words(f"{len(num_keep)} counts"))
        return [1.0 if count is None else check_count(op, count) for count in num_keep]
    if schedule is None:
        schedule = idle_schedule(depth, check_ratio(op, 0.7 if keep_ratio is None else keep_ratio))
    return list(check_schedule(op, schedule, depth))


def _leave_whole_in_fx() -> None:
    """Tells timm's FX feature extractor that an idle block is one node: what it selects depends on values."""
    layers: Any = sys.modules.get("timm.layers")
    if layers is not None:
        layers.register_notrace_module(IdleBlock)


def set_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[float]) -> None:
    """Changes how many tokens a live idle model keeps; a server may do it from one request to the next.

    Args:
        model: idle.
        keep_ratio: r, which gives ``idle_schedule(depth, r)`` as ``apply_idle`` has it; or one ratio for each layer.

    Raises:
        TypeError, ValueError: the model is not idle, or the ratio does not fit. The model is unchanged then.
    """
    op = "set_keep_ratio"
    blocks = _all_idle(op, model)
    if isinstance(keep_ratio, Sequence):
        keeps = _keeps(op, len(blocks), None, keep_ratio, None)
    else:
        keeps = _keeps(op, len(blocks), check_ratio(op, keep_ratio), None, None)
    for block, keep in zip(blocks, keeps, strict=True):
        block.keep = keep


def idle_config(model: nn.Module) -> dict[str, Any]:
    """The settings of an idle model, as JSON takes them: ``apply_idle(dense, **idle_config(model))`` makes it anew.

    Raises:
        TypeError, ValueError: the model is not idle, or is scored or selected by a function, which is no JSON; pass it
            to ``apply_idle`` yourself.
    """
    op = "idle_config"
    blocks = _all_idle(op, model)
    first = blocks[0]
    for name in ("scorer", "select"):
        if any(callable(getattr(block, name)) for block in blocks):
            raise value_error(
                op, name, "a name, for a function is no JSON; pass it to apply_idle", getattr(first, name)
            )
        if any(getattr(block, name) != getattr(first, name) for block in blocks):
            raise value_error(op, name, "the same in all blocks", Words("blocks that differ"))
    keeps = [block.keep for block in blocks]
    counts = any(isinstance(keep, int) for keep in keeps)
    if counts and any(isinstance(keep, float) and keep < 1 for keep in keeps):
        raise value_error(op, "model", "one with ratios or with counts", Words("one with both"))
    how: dict[str, Any] = {"schedule": keeps}
    if counts:
        how = {"num_keep": [keep if isinstance(keep, int) else None for keep in keeps]}
    return {**how, "scorer": first.scorer, "select": first.select}


def _all_idle(op: str, model: nn.Module) -> list[IdleBlock]:
    """Every block that ``apply_idle`` has wrapped, those that compute all tokens, too."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    blocks = [module for module in model.modules() if isinstance(module, IdleBlock)]
    if not blocks:
        raise value_error(op, "model", "idle (call apply_idle first)", Words(f"a dense {type(model).__name__}"))
    return blocks


def remove_idle(model: Model) -> Model:
    """Gives every block of an idle model its dense form back, in place, and returns the model.

    Each block is the object that stood there before, with the modules, parameters, buffers, hooks and attributes that
    the idle one has now. Blocks that were put in the place of idle ones stay.

    Raises:
        ValueError: the model has no idle blocks.
        TypeError, RuntimeError: a block is wrapped in something that holds on to it, or had its forward replaced; the
            message says what to undo first. The model is unchanged then.
    """
    op = "remove_idle"
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    holders = [(m, name, child) for m in model.modules() for name, child in m._modules.items()]
    idle = [(m, name, child) for m, name, child in holders if isinstance(child, IdleBlock)]
    if isinstance(model, IdleBlock) or not idle:
        got = Words(f"{'an IdleBlock alone' if isinstance(model, IdleBlock) else 'a dense'} {type(model).__name__}")
        raise value_error(op, "model", "one that apply_idle made idle", got)
    for holder, name, child in idle:
        if type(holder).__name__ in _HOLD_ON:
            raise ArgumentTypeError(
                f"{op}: an idle block is wrapped in {type(holder).__name__} ({_HOLD_ON[type(holder).__name__]}), which"
                f" would go on to call it: unwrap it first (its attribute {name!r} is the block)"
            )
        child.check_removable(op)
    for holder, name, child in idle:
        holder._modules[name] = child.dense_block()
    for module in list(model.modules()):
        for family in FAMILIES:
            if hasattr(family, "unset_blocks") and family.find(module) is module:
                family.unset_blocks(module)
    return model


_HOLD_ON = {"OptimizedModule": "torch.compile", "FullyShardedDataParallel": "FSDP", "DistributedDataParallel": "DDP"}


def find_family(op: str, model: nn.Module) -> tuple[ModuleType, nn.Module]:
    """The module that describes the model's family, and the model of that family in it."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    for family in FAMILIES:
        found = family.find(model)
        if found is not None:
            reasons = _reasons(family, found)
            if reasons:
                raise ArgumentTypeError(f"{op}: {type(found).__name__} cannot idle: {'; '.join(reasons)}")
            return family, found
    for name, reason in _POOR_FITS.items():
        kind = library_class(name)
        if kind is not None and isinstance(getattr(model, "model", model), kind):
            raise ArgumentTypeError(f"{op}: {name} cannot idle: {reason}")
    wrapped = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(wrapped, nn.Module):
        raise ArgumentTypeError(
            f"{op}: model must not be wrapped yet, got {type(model).__name__} around {type(wrapped).__name__}."
            f" Call {op} on the model itself, before torch.compile or DistributedDataParallel."
        )
    known = ", ".join(family.NAME for family in FAMILIES)
    raise ArgumentTypeError(
        f"{op}: model must be one of: {known}; got {type(model).__module__}.{type(model).__name__}."
        " If its blocks are of a class that those models use, wrap them by hand:"
        " IdleBlock(block, keep_ratio, num_prefix_tokens)."
    )


def _reasons(family: ModuleType, model: nn.Module) -> list[str]:
    """Why the blocks of the model cannot idle, once each, in order; empty if they can."""
    found: dict[str, None] = {}
    for block in family.blocks(model):
        if isinstance(block, IdleBlock):
            continue
        form = find_form(block)
        reason = f"its blocks are {form}" if isinstance(form, str) and not form.startswith("its ") else form
        if isinstance(reason, str):
            found[reason] = None
        elif hasattr(family, "why_not") and family.why_not(block):
            found[family.why_not(block)] = None
    return list(found)
