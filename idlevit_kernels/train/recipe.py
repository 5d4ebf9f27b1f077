"""The hyper-parameters of a training run, each with its source. The defaults are the paper's 30-epoch finetuning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..errors import type_error, value_error
from ..schedule import check_ratio, check_schedule, read_schedule

# Where a default comes from.
PAPER = "arXiv 2310.05654, section 4.1"
COMMAND = "the command in the README of the authors' release, github.com/Ackesnal/IdleViT"
SCRIPT = "default of main.py in the authors' release, which is DeiT's"
HERE = "this package"


def _hyper(default: Any, source: str, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"source": source, "help": help})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run; two runs with equal recipes end with the same weights.

    That holds bit for bit on a CPU in float32, with the same number of threads and processes. `idlevit train` has an
    option for each field.
    """

    data: str = _hyper("digits", HERE, "digits, the folder of a data set, or a name that timm knows, as torch/cifar10.")
    model: str = _hyper("deit_small_patch16_224", PAPER, "Name of a timm VisionTransformer, or digits_vit.")
    image_size: int | None = _hyper(None, HERE, "Height and width of images; by default what the model was made for.")
    keep_ratio: float = _hyper(0.7, PAPER, "Share of image tokens that the first idle stage keeps; 1 trains dense.")
    schedule: str | None = _hyper(
        None, HERE, "A ratio for each layer, over --keep-ratio: 1,1,0.7,0.5, or the file that `idlevit tune` wrote."
    )

    weights: str = _hyper("pretrained", PAPER, "To start from: pretrained (timm's), a file, none, or dense (digits).")
    teacher: str | None = _hyper(
        None, PAPER, "timm name or file; by default the dense model that training starts from."
    )

    epochs: int = _hyper(30, PAPER, "Passes over the data.")
    batch_size: int = _hyper(2048, COMMAND, "Images of a step, over all processes: two of 1024 in the source.")
    accumulate: int = _hyper(1, HERE, "Forward and backward passes that make a step, to save memory.")
    lr: float = _hyper(1e-5, COMMAND, "Learning rate at a batch of 512; it is scaled in proportion to the batch.")
    min_lr: float = _hyper(1e-6, COMMAND, "Where the cosine ends, which falls at each step; not scaled.")
    warmup_epochs: int = _hyper(0, SCRIPT, "Epochs of linear rise to the learning rate.")
    weight_decay: float = _hyper(0.05, SCRIPT, "Of AdamW; none on biases and one-dimensional parameters.")
    freeze_embeddings: bool = _hyper(True, SCRIPT, "Keep the class token and the position embedding as they are.")
    clip_grad: float | None = _hyper(None, SCRIPT, "Largest norm of the gradient; by default it is not clipped.")
    ema_decay: float = _hyper(0.99996, SCRIPT, "Of the moving average of the weights.")
    dtype: str = _hyper("float32", HERE, "float32, or the type of autocast: bfloat16 or float16 (with a scaled loss).")

    cut_kind: str = _hyper("both", COMMAND, "Terms of the token cut loss: both, inter, intra or none.")
    cut_weight: float = _hyper(20.0, SCRIPT, "Of the token cut loss.")
    distill_weight: float = _hyper(10.0, COMMAND, "Of the teacher's logits; its features weigh 100 times that.")

    random_augment: str = _hyper("rand-m9-mstd0.5-inc1", SCRIPT, "RandAugment as timm spells it, or none.")
    random_erasing: float = _hyper(0.25, SCRIPT, "Probability that a part of an image becomes noise.")
    aug_repeats: int = _hyper(3, SCRIPT, "Augmentations of an image in an epoch, which then sees a part of the images.")
    mixup: float = _hyper(0.8, SCRIPT, "Alpha of mixup; 0 is none.")
    cutmix: float = _hyper(1.0, SCRIPT, "Alpha of cutmix; 0 is none.")
    label_smoothing: float = _hyper(0.1, SCRIPT, "Share of the target that goes to all classes alike.")
    interpolation: str = _hyper("bicubic", SCRIPT, "Of resized training images.")

    seed: int = _hyper(0, SCRIPT, "Of all randomness.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        object.__setattr__(self, "keep_ratio", check_ratio("train", self.keep_ratio))
        if self.schedule is not None:
            _check("schedule", self.keep_ratio < 1, "left out where keep_ratio is 1", self.schedule)
            # As numbers, so that a run does not depend on a file.
            object.__setattr__(self, "schedule", ",".join(f"{r:g}" for r in _ratios(self.schedule)))
        for name in ("epochs", "batch_size", "accumulate", "aug_repeats", "image_size"):
            value = getattr(self, name)
            _check(name, value is None or value >= 1, "at least 1", value)
        for name in "warmup_epochs weight_decay cut_weight distill_weight mixup cutmix lr min_lr seed".split():
            value = getattr(self, name)
            _check(name, 0 <= value < math.inf, "at least 0 and finite", value)
        expected = "greater than 0 and finite (left out, nothing is clipped)"
        _check("clip_grad", self.clip_grad is None or 0 < self.clip_grad < math.inf, expected, self.clip_grad)
        for name in ("random_erasing", "label_smoothing", "ema_decay"):
            _check(name, 0 <= getattr(self, name) < 1, "in [0, 1)", getattr(self, name))
        modes = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
        _check("interpolation", self.interpolation in modes, f"one of {', '.join(modes)}", self.interpolation)
        _check("dtype", self.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16", self.dtype)
        if self.weights == "dense":
            _check("weights", self.data == "digits" and self.keep_ratio < 1, "pretrained, none or a file", "dense")
        _check(
            "cut_kind", self.cut_kind in ("both", "inter", "intra", "none"), "both, inter, intra or none", self.cut_kind
        )
        _check(
            "warmup_epochs", self.warmup_epochs < self.epochs, f"less than epochs = {self.epochs}", self.warmup_epochs
        )
        expected = f"at most the scaled learning rate, lr * batch_size / 512 = {self.scaled_lr:g}"
        _check("min_lr", self.min_lr <= self.scaled_lr, expected, self.min_lr)

    @property
    def idle(self) -> dict[str, Any]:
        """The arguments of ``apply_idle`` that say how many tokens each layer keeps."""
        return {"keep_ratio": self.keep_ratio} if self.schedule is None else {"schedule": _ratios(self.schedule)}

    @property
    def scaled_lr(self) -> float:
        return self.lr * self.batch_size / 512

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def check_split(self, world_size: int) -> int:
        """Images of one forward pass of one process; an error if the batch does not split evenly."""
        parts = world_size * self.accumulate * (2 if self.mixes else 1)
        pairs = ", and mixup and cutmix need pairs" if self.mixes else ""
        expected = f"a multiple of {parts} ({world_size} processes, accumulate = {self.accumulate}{pairs})"
        _check("batch_size", self.batch_size % parts == 0, expected, self.batch_size)
        return self.batch_size // (world_size * self.accumulate)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """One line for each field whose value there is another."""
        own = dataclasses.asdict(self)
        return [f"{k}: {other.get(k)!r} there, {own.get(k)!r} here" for k in own | other if own.get(k) != other.get(k)]


# What suits a model of a hundred thousand weights and a thousand images. There are too few steps for a slow moving
# average, and erasing or mixing digits makes other digits of them.
DIGITS: dict[str, Any] = {
    "data": "digits",
    "model": "digits_vit",
    "weights": "dense",
    "epochs": 6,
    "batch_size": 64,
    "lr": 8e-3,
    "min_lr": 1e-5,
    "clip_grad": 1.0,
    "ema_decay": 0.95,
    "random_augment": "none",
    "random_erasing": 0.0,
    "aug_repeats": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
}
DIGITS_DENSE: dict[str, Any] = DIGITS | {
    "weights": "none",
    "keep_ratio": 1.0,
    "epochs": 40,
    "lr": 1.6e-2,
    "warmup_epochs": 5,
    "freeze_embeddings": False,
}


def recipe_for(given: dict[str, Any], only: Sequence[str] | None = None) -> Recipe:
    """The recipe for the data that is given, with what else is given; ``only`` those of its fields are taken over."""
    preset: dict[str, Any] = {}
    if given.get("data", "digits") == "digits":
        preset = DIGITS_DENSE if given.get("keep_ratio") == 1 else DIGITS
    return Recipe(**(preset | {k: v for k, v in given.items() if only is None or k in only}))


def _ratios(schedule: str) -> list[float]:
    parts = schedule.split(",")
    try:
        ratios = [float(part) for part in parts]
    except ValueError:
        return read_schedule("train", schedule)
    return check_schedule("train", ratios, len(ratios))


def _check(name: str, holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise value_error("train", name, expected, got)


def _check_type(name: str, value: Any, annotation: str) -> None:
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}
    base = annotation.removesuffix(" | None")
    if value is None and base != annotation:
        return
    if not isinstance(value, kinds[base]) or (isinstance(value, bool) and base != "bool"):  # type: ignore[arg-type]
        raise type_error("train", name, f"of type {annotation}", value)
