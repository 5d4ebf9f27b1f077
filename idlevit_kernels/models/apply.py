"""``apply_idle`` and ``remove_idle`` for every model in which a registered family finds blocks (see ``family``)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ..block import IdleBlock, IdleSequential
from ..block.api import check_count, give_back
from ..block.latency import slower_than_dense
from ..block.parts import find_form
from ..block.scoring import Scorer, Select, check_scorer, check_select
from ..errors import ArgumentTypeError, Words, refuse_renamed, type_error, value_error
from ..ops.checks import check_integer
from ..ops.flops import register_flop_formulas
from ..schedule import check_ratio, check_schedule, idle_schedule
from .eva import Evas
from .family import Encoder, encoders, family_names, places, register_family
from .huggingface import TransformersViTs
from .inputs import block_inputs
from .swin import SwinTransformers
from .twins import TwinsTransformers
from .vit import VisionTransformers

Model = TypeVar("Model", bound=nn.Module)

for _family in (VisionTransformers(), Evas(), SwinTransformers(), TwinsTransformers(), TransformersViTs()):
    register_family(_family)

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
    schedule: Sequence[Any] | None = None,
    *,
    num_keep: Sequence[Any] | None = None,
    scorer: Scorer = "auto",
    select: Select = "top",
    adaptive_batch: int | None = None,
    **renamed: Any,
) -> Model:
    """Makes a dense model an IdleViT: swaps its blocks for idle ones, in place, and returns it.

    Weights, state-dict keys and the model's interface stay as they are; ``remove_idle`` undoes it. Layers whose ratio
    is 1 compute all tokens. Call it before ``torch.compile``, DistributedDataParallel or FSDP.

    Args:
        model: one that a family finds its blocks in, any depth down: a timm VisionTransformer, Eva, SwinTransformer,
            ..., a transformers ViT, DeiT or DINOv2, or your own (``register_family``). It may hold several encoders.
        keep_ratio: r in (0, 1], 0.7 if nothing is given; the layers get ``idle_schedule(depth, r)``, each encoder by
            its own depth. The layers of a pyramid count through all its stages: its early, wide ones are the dense
            quarter.
        schedule: instead, one ratio for each layer, 1.0 for dense; of several encoders, a list of such lists.
        num_keep: instead, how many image tokens each layer computes, None for dense; of each window in a pyramid of
            windows; of several encoders, a list of such lists.
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
    found = find_encoders(op, model)
    if adaptive_batch is not None:
        check_integer(op, "adaptive_batch", adaptive_batch)
        if adaptive_batch < 1:
            raise value_error(op, "adaptive_batch", "at least 1", adaptive_batch)
    if any(isinstance(block, IdleBlock) for encoder in found for block in encoder.blocks):
        got = Words(f"a model with {len(idle_blocks(model))} idle blocks")
        raise value_error(op, "model", "dense; call remove_idle first", got)
    keeps = _keeps(op, [len(encoder.blocks) for encoder in found], keep_ratio, schedule, num_keep)
    select = check_select(op, select)
    idle = [_idle_blocks_of(op, encoder, its, scorer, select) for encoder, its in zip(found, keeps, strict=True)]
    if adaptive_batch is not None:
        dense = [block for encoder in found for block in encoder.blocks]
        every = [block for blocks in idle for block in blocks]
        slower = slower_than_dense(every, dense, block_inputs(model, dense, adaptive_batch))
        for block, slow in zip(every, slower, strict=True):
            if slow:
                block.keep = 1.0
    register_flop_formulas()  # before the user makes a counter
    _leave_whole_in_fx()
    for encoder, blocks in zip(found, idle, strict=True):
        encoder.family.set_blocks(encoder.place, list(blocks))
    return model


def _idle_blocks_of(op: str, encoder: Encoder, keeps: list[int | float], scorer: Any, select: Any) -> list[IdleBlock]:
    family, place = encoder.family, encoder.place
    prefix = family.num_prefix_tokens(place)
    scorer = check_scorer(op, family.default_scorer(place) if scorer == "auto" else scorer, prefix)
    idle = [make_idle(block, keep, prefix, scorer, select) for block, keep in zip(encoder.blocks, keeps, strict=True)]
    for layer, block in enumerate(idle):
        block.layer = layer
    return idle


def make_idle(block: nn.Module, keep: int | float, num_prefix_tokens: int, scorer: Any, select: Any) -> IdleBlock:
    """``keep``: a ratio if it is a float, a count if it is an int."""
    how: dict[str, Any] = {"keep_ratio": keep} if isinstance(keep, float) else {"num_keep": keep}
    return IdleBlock(block, num_prefix_tokens=num_prefix_tokens, scorer=scorer, select=select, **how)


def _keeps(
    op: str,
    depths: list[int],
    keep_ratio: float | None,
    schedule: Sequence[Any] | None,
    num_keep: Sequence[Any] | None,
) -> list[list[int | float]]:
    """A ratio (float) or a count (int) for each layer of each encoder."""
    given = {"keep_ratio": keep_ratio, "schedule": schedule, "num_keep": num_keep}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise value_error(op, named[1], f"None where {named[0]} is given (one of the two)", given[named[1]])
    if num_keep is not None:
        return [_counts(op, its, depth) for its, depth in _by_encoder(op, "num_keep", num_keep, depths)]
    if schedule is not None:
        return [list(check_schedule(op, its, depth)) for its, depth in _by_encoder(op, "schedule", schedule, depths)]
    ratio = check_ratio(op, 0.7 if keep_ratio is None else keep_ratio)
    return [list(idle_schedule(depth, ratio)) for depth in depths]


def _by_encoder(op: str, name: str, value: Sequence[Any], depths: list[int]) -> list[tuple[Any, int]]:
    """What each encoder of so many layers was given."""
    if len(depths) == 1:
        return [(value, depths[0])]
    lists = isinstance(value, Sequence) and all(isinstance(its, Sequence) and not isinstance(its, str) for its in value)
    if not lists or len(value) != len(depths):
        expected = f"one list for each of the {len(depths)} encoders, which have {', '.join(map(str, depths))} layers"
        raise value_error(op, name, expected, value)
    return list(zip(value, depths, strict=True))


def _counts(op: str, num_keep: Any, depth: int) -> list[int | float]:
    if isinstance(num_keep, str) or not isinstance(num_keep, Sequence):
        raise type_error(op, "num_keep", f"a sequence of {depth} counts, None for a dense layer", num_keep)
    if len(num_keep) != depth:
        expected = f"one count for each of the {depth} layers, None for a dense one"
        raise value_error(op, "num_keep", expected, Words(f"{len(num_keep)} counts"))
    return [1.0 if count is None else check_count(op, count) for count in num_keep]


def _leave_whole_in_fx() -> None:
    """Tells timm's FX feature extractor that an idle block is one node: what it selects depends on values."""
    layers: Any = sys.modules.get("timm.layers")
    if layers is not None:
        layers.register_notrace_module(IdleBlock)


def set_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[Any]) -> None:
    """Changes how many tokens a live idle model keeps; a server may do it from one request to the next.

    Args:
        model: idle.
        keep_ratio: r, which gives ``idle_schedule(depth, r)`` as ``apply_idle`` has it; or one ratio for each layer; of
            several encoders, a list of such lists.

    Raises:
        TypeError, ValueError: the model is not idle, or the ratio does not fit. The model is unchanged then.
    """
    op = "set_keep_ratio"
    by_encoder = _all_idle(op, model)
    depths = [len(blocks) for blocks in by_encoder]
    if isinstance(keep_ratio, Sequence):
        given = _keeps(op, depths, None, keep_ratio, None)
    else:
        given = _keeps(op, depths, check_ratio(op, keep_ratio), None, None)
    for blocks, keeps in zip(by_encoder, given, strict=True):
        for block, keep in zip(blocks, keeps, strict=True):
            block.keep = keep


def idle_config(model: nn.Module) -> dict[str, Any]:
    """The settings of an idle model, as JSON takes them: ``apply_idle(dense, **idle_config(model))`` makes it anew.

    Raises:
        TypeError, ValueError: the model is not idle, or is scored or selected by a function, which is no JSON; pass it
            to ``apply_idle`` yourself.
    """
    op = "idle_config"
    by_encoder = _all_idle(op, model)
    every = [block for blocks in by_encoder for block in blocks]
    if any(callable(value) for block in every for value in (block.scorer, block.select)):
        name = "scorer" if any(callable(block.scorer) for block in every) else "select"
        got = next(getattr(block, name) for block in every if callable(getattr(block, name)))
        raise value_error(op, name, "a name, for a function is no JSON; pass it to apply_idle", got)
    scorers, selects = ({getattr(block, name) for block in every} for name in ("scorer", "select"))
    for name, values in (("scorer", scorers), ("select", selects)):
        if len(values) > 1 and not (name == "scorer" and _all_auto(model, by_encoder)):
            raise value_error(op, name, "the same in all blocks", Words("blocks that differ"))
    keeps = [[block.keep for block in blocks] for blocks in by_encoder]
    flat = [keep for its in keeps for keep in its]
    counts = any(isinstance(keep, int) for keep in flat)
    if counts and any(isinstance(keep, float) and keep < 1 for keep in flat):
        raise value_error(op, "model", "one with ratios or with counts", Words("one with both"))
    if counts:
        lists: list[Any] = [[keep if isinstance(keep, int) else None for keep in its] for its in keeps]
    else:
        lists = keeps
    how = {"num_keep" if counts else "schedule": lists[0] if len(lists) == 1 else lists}
    return {**how, "scorer": scorers.pop() if len(scorers) == 1 else "auto", "select": selects.pop()}


def _all_auto(model: nn.Module, by_encoder: list[list[IdleBlock]]) -> bool:
    """Whether each encoder is scored as its family does by default."""
    found = encoders(model)
    return len(found) == len(by_encoder) and all(
        block.scorer == encoder.family.default_scorer(encoder.place)
        for encoder, blocks in zip(found, by_encoder, strict=True)
        for block in blocks
    )


def _all_idle(op: str, model: nn.Module) -> list[list[IdleBlock]]:
    """Every block that ``apply_idle`` has wrapped, those that compute all tokens, too; by encoder, in order. A new one
    begins where the layers do not count on."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    blocks = [module for module in model.modules() if isinstance(module, IdleBlock)]
    if not blocks:
        raise value_error(op, "model", "idle (call apply_idle first)", Words(f"a dense {type(model).__name__}"))
    by_encoder = [[blocks[0]]]
    for before, block in itertools.pairwise(blocks):
        if block.layer is not None and block.layer <= (-1 if before.layer is None else before.layer):
            by_encoder.append([])
        by_encoder[-1].append(block)
    return by_encoder


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
    for holder, name, held in holders:
        if isinstance(held, IdleSequential):
            holder._modules[name] = give_back(held, nn.Sequential, ("_dense",))
    return model


_HOLD_ON = {
    "OptimizedModule": "torch.compile",
    "FullyShardedDataParallel": "FSDP",
    "DistributedDataParallel": "DDP",
    "DataParallel": "DataParallel",
}


def find_encoders(op: str, model: nn.Module) -> list[Encoder]:
    """The model's encoders, at least one, all of which can idle."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    found = encoders(model)
    for wrapper in _wrappers(model, found):
        raise ArgumentTypeError(
            f"{op}: model must not be wrapped yet, got one in {type(wrapper).__name__}. Call {op} on the model itself,"
            " before torch.compile or DistributedDataParallel."
        )
    for encoder in found:
        reasons = _reasons(encoder)
        if reasons:
            which = f" ({encoder.name})" if len(found) > 1 else ""
            raise ArgumentTypeError(
                f"{op}: {type(model).__name__}{which} cannot idle: {'; '.join(reasons)}{_others(op, found)}"
            )
    if found:
        return found
    for name, reason in _POOR_FITS.items():
        if places(model, name):
            raise ArgumentTypeError(f"{op}: {name} cannot idle: {reason}")
    known = ", ".join(family_names())
    raise ArgumentTypeError(
        f"{op}: model must be one of: {known}, or hold one; got {type(model).__module__}.{type(model).__name__}."
        f" {_nearest(model)}"
    )


def _wrappers(model: nn.Module, found: list[Encoder]) -> list[nn.Module]:
    """Modules around an encoder, or the model itself, that go on to call what they were made around."""
    around = {id(model): model}
    for encoder in found:
        path = encoder.name.split(".")
        above = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
        around.update((id(module), module) for module in above)
    return [module for module in around.values() if type(module).__name__ in _HOLD_ON]


def _others(op: str, found: list[Encoder]) -> str:
    """Which of several encoders can idle where one cannot."""
    able = [encoder.name for encoder in found if not _reasons(encoder)]
    return f". Call {op} on what can, one by one: {', '.join(able)}" if able else ""


def _nearest(model: nn.Module) -> str:
    """What works for a model that no family knows."""
    able = [(name, module) for name, module in model.named_modules() if not isinstance(find_form(module), str)]
    if able:
        name, block = able[0]
        return (
            f"It has {len(able)} blocks that can idle, {name} ({type(block).__name__}) and so on: put"
            " IdleBlock(block, keep_ratio, num_prefix_tokens) in their place, or register a family that finds them"
            " (ik.register_family, CONTRIBUTING.md)."
        )
    return "A family teaches it another architecture: ik.register_family, examples/own_vit.py."


def _reasons(encoder: Encoder) -> list[str]:
    """Why its blocks cannot idle, once each, in order; empty if they can."""
    found: dict[str, None] = {}
    for block in encoder.blocks:
        form = None if isinstance(block, IdleBlock) else find_form(block)
        if isinstance(form, str):
            found[form if form.startswith("its ") else f"its blocks are {form}"] = None
    if not found:
        reason = encoder.family.why_unsupported(encoder.place)
        return [] if reason is None else [reason]
    return list(found)
