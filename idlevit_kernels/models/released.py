"""Weights that the authors of IdleViT (arXiv 2310.05654), DeiT and LV-ViT released, or that the same scripts write.

A file is a dict with the weights under ``model`` or ``state_dict``, perhaps their moving average under ``model_ema`` or
``state_dict_ema``, the optimizer's state and the command line under ``args``; or it is the weights alone.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentValueError, type_error, value_error
from ..schedule import check_ratio, idle_schedule
from ..versions import library_class
from .apply import apply_idle

Model = TypeVar("Model", bound=nn.Module)

_WEIGHTS = ("model", "state_dict")
_AVERAGES = ("model_ema", "state_dict_ema")
_SHOWN = 10


def load_released(
    model: Model,
    file: str | os.PathLike[str],
    ema: bool = False,
    schedule: str | None = None,
    keep_ratio: float | None = None,
) -> Model:
    """Loads a released checkpoint into a dense or idle model, strictly, in place, and returns the model.

    The file is read without running any code in it: tensors, plain values and ``argparse.Namespace``, nothing else.
    Idle and dense models have the same keys, so one file fits both; saving ``{"model": model.state_dict()}`` gives a
    file that the authors' scripts load.

    Args:
        model: the same architecture as in the file: ``deit_small_patch16_224`` and ``deit_base_patch16_224`` of timm
            for DeiT and IdleViT-DeiT, ``lvvit_*_patch16_224`` (after ``import idlevit_kernels.models.lvvit``) for
            LV-ViT and IdleViT-LV-ViT.
        file: path of the checkpoint.
        ema: load the moving average of the weights instead.
        schedule: make the dense model idle, too: "inference" as the released evaluation does (the first quarter of the
            layers is dense: layers 3..11 idle in DeiT), or "training" as the models were finetuned (DeiT: layers 4..11
            idle; LV-ViT as in "inference"). None leaves the blocks as they are.
        keep_ratio: r of that schedule; by default the ``base_rate`` that the file names.

    Raises:
        ValueError: the file holds no weights of this architecture (the message names the first ten keys that are
            missing, unexpected or of another shape), no moving average, or more than plain data; the schedule does not
            fit. The model is unchanged then.
        TypeError: an argument of the wrong type.
        OSError: the file cannot be read.
    """
    op = "load_released"
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    if schedule not in (None, "inference", "training"):
        raise value_error(op, "schedule", "'inference', 'training' or None", schedule)
    if schedule is None and keep_ratio is not None:
        raise value_error(op, "keep_ratio", "None where no schedule is asked for", keep_ratio)
    content = _read(op, file)
    weights = _weights(op, content, ema)
    _check_keys(op, model, weights)
    if schedule is not None:
        ratio = check_ratio(op, _base_rate(op, content) if keep_ratio is None else keep_ratio)
        ratios = idle_schedule(len(model.blocks), ratio)  # type: ignore[arg-type]
        if schedule == "training" and not _is_lvvit(model):
            ratios = [1.0, *ratios[:-1]]
        apply_idle(model, schedule=ratios)
    model.load_state_dict(weights, strict=True)
    return model


def _is_lvvit(model: nn.Module) -> bool:
    kind = library_class("LVViT")
    return kind is not None and isinstance(model, kind)


def _read(op: str, file: str | os.PathLike[str]) -> dict[str, Any]:
    if not isinstance(file, (str, os.PathLike)):
        raise type_error(op, "file", "the path of a checkpoint", file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        got = f"{file}, which holds {unsafe[1]}" if unsafe else f"{file}, which is no checkpoint"
        expected = "a checkpoint of tensors, plain values and argparse.Namespace, for nothing else is unpickled"
        raise ArgumentValueError(f"{op}: file must be {expected}, got {got}") from error
    except (EOFError, RuntimeError) as error:
        raise ArgumentValueError(
            f"{op}: file must be a checkpoint, got {file}, which is cut off or damaged: {error}"
        ) from error
    if not isinstance(content, dict):
        raise type_error(op, "file", "a checkpoint that holds a dict", type(content))
    return content


def _weights(op: str, content: dict[str, Any], ema: bool) -> dict[str, Tensor]:
    names = _AVERAGES if ema else _WEIGHTS
    found = next((content[name] for name in names if isinstance(content.get(name), dict)), None if ema else content)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        expected = (
            f"a checkpoint with weights under {' or '.join(map(repr, names))}{'' if ema else ', or nothing else'}"
        )
        entries = [name if isinstance(name, str) else repr(name) for name in content]
        raise ArgumentValueError(f"{op}: file must be {expected}, got one with the entries {_first(entries)}")
    if all(name.startswith("module.") for name in found):  # of DistributedDataParallel
        return {name.removeprefix("module."): value for name, value in found.items()}
    return found


def _check_keys(op: str, model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    shapes = [
        f"{name} ({list(weights[name].shape)} instead of {list(value.shape)})"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    differences = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    found = [f"{len(names)} {kind}: {_first(names)}" for kind, names in differences.items() if names]
    if found:
        raise ArgumentValueError(
            f"{op}: file must hold exactly the weights of the model, a {type(model).__name__}, but of its"
            f" {len(weights)} keys {'; '.join(found)}. Make the model that the file was saved from."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _base_rate(op: str, content: dict[str, Any]) -> float:
    rate = getattr(content.get("args"), "base_rate", None)
    if rate is None:
        raise value_error(op, "keep_ratio", "given: the file does not name the ratio it was trained with", None)
    return rate
