"""``apply_idle`` and ``remove_idle`` for every model family that a module here describes.

Such a module has a NAME; IDLE_BLOCK, the class of its idle blocks (an IdleBlock); ``find``, what holds the blocks in a
model, or None; ``blocks``, all of them in the order they run, whatever stages they lie in; ``set_blocks``;
``num_prefix_tokens``; ``default_scorer``; ``reasons``, why the model cannot idle. A family whose image tokens stay one
sequence from the first block to the last can be trained if it has ``embed``, images to the tokens of the first block
and the keyword arguments of each block, and ``head``, tokens of the last block to logits and features (those of
``IdleViTOutput``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar

from torch import nn

from ..block import IdleBlock
from ..complexity import register_flop_formulas
from ..errors import Words, type_error, value_error
from ..functional import check_integer
from ..latency import block_inputs, slower_than_dense
from ..schedule import check_ratio, check_schedule, idle_schedule
from ..scoring import check_scorer
from . import eva, huggingface, swin, twins, vit

Model = TypeVar("Model", bound=nn.Module)

FAMILIES = (vit, eva, swin, twins, huggingface)


def idle_blocks(model: nn.Module) -> dict[str, IdleBlock]:
    """The blocks whose image tokens may idle (keep ratio below 1) by name, in order; empty for a dense model."""
    if not isinstance(model, nn.Module):
        raise type_error("idle_blocks", "model", "a torch.nn.Module", model)
    return {name: m for name, m in model.named_modules() if isinstance(m, IdleBlock) and m.keep_ratio < 1}


def apply_idle(
    model: Model,
    keep_ratio: float | None = None,
    schedule: Sequence[float] | None = None,
    scorer: str = "auto",
    adaptive: bool = False,
    batch: int = 1,
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
        scorer: "cls", "mean" or "auto": the class token where the model has one, else the column mean.
        adaptive: leave dense the layers in which idling does not pay on the model's device, in its dtype, at ``batch``.
            Idling saves arithmetic and costs a few calls: a small batch on a large GPU can be faster dense. Each kind
            of layer is timed, idle and dense, at inference on images of the model's own size; it takes a second or two.
            The result differs from machine to machine, and from run to run where it hardly matters: to fix it, take
            the ratios (``[b.keep_ratio for b in model.blocks]``), or a schedule of ``idlevit tune``.
        batch: images in a batch, for ``adaptive``.

    Raises:
        TypeError: the model is of no supported family, or has blocks that cannot idle; the message gives the reason.
        ValueError: a ratio or schedule that does not fit, or a model that is idle already.
        The model is unchanged if anything is raised.
    """
    family, found = find_family("apply_idle", model)
    blocks = family.blocks(found)
    check_integer("apply_idle", "batch", batch)
    if batch < 1:
        raise value_error("apply_idle", "batch", "at least 1", batch)
    if any(isinstance(block, IdleBlock) for block in blocks):
        got = Words(f"a model with {len(idle_blocks(model))} idle blocks")
        raise value_error("apply_idle", "model", "dense; call remove_idle first", got)
    if schedule is not None and keep_ratio is not None:
        raise value_error("apply_idle", "schedule", "None where keep_ratio is given (one of the two)", schedule)
    if schedule is None:
        ratio = check_ratio("apply_idle", 0.7 if keep_ratio is None else keep_ratio)
        schedule = idle_schedule(len(blocks), ratio)
    ratios = check_schedule("apply_idle", schedule, len(blocks))
    prefix = family.num_prefix_tokens(found)
    scorer = check_scorer("apply_idle", family.default_scorer(found) if scorer == "auto" else scorer, prefix)
    idle = [family.IDLE_BLOCK(block, ratio, prefix, scorer) for block, ratio in zip(blocks, ratios, strict=True)]
    if adaptive:
        dense = [family.IDLE_BLOCK(block, 1.0, prefix, scorer) for block in blocks]
        slower = slower_than_dense(idle, blocks, block_inputs(model, blocks, batch))
        idle = [d if slow else i for i, d, slow in zip(idle, dense, slower, strict=True)]
    register_flop_formulas()  # before the user makes a counter
    family.set_blocks(found, idle)
    return model


def remove_idle(model: Model) -> Model:
    """Gives every block of an idle model its dense form back, in place, with the present weights; returns the model.

    Raises:
        ValueError: the model has no idle blocks.
    """
    if not isinstance(model, nn.Module):
        raise type_error("remove_idle", "model", "a torch.nn.Module", model)
    if not any(isinstance(module, IdleBlock) for module in model.modules()):
        got = Words(f"a dense {type(model).__name__}")
        raise value_error("remove_idle", "model", "one that apply_idle made idle", got)
    family, found = find_family("remove_idle", model)
    blocks = [b.dense_block() if isinstance(b, IdleBlock) else b for b in family.blocks(found)]
    family.set_blocks(found, blocks)
    return model


def find_family(op: str, model: nn.Module) -> tuple[ModuleType, nn.Module]:
    """The module that describes the model's family, and the model of that family in it."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    for family in FAMILIES:
        found = family.find(model)
        if found is not None:
            reasons = family.reasons(found)
            if reasons:
                raise TypeError(f"{op}: {type(found).__name__} cannot idle: {'; '.join(reasons)}")
            return family, found
    wrapped = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(wrapped, nn.Module):
        raise TypeError(
            f"{op}: model must not be wrapped yet, got {type(model).__name__} around {type(wrapped).__name__}."
            f" Call {op} on the model itself, before torch.compile or DistributedDataParallel."
        )
    known = ", ".join(family.NAME for family in FAMILIES)
    raise TypeError(
        f"{op}: model must be one of: {known}; got {type(model).__module__}.{type(model).__name__}."
        " For another architecture wrap its pre-norm blocks by hand: IdleBlock(block, keep_ratio, num_prefix_tokens)."
    )
