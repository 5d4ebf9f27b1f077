"""How near a model's outputs are to another's on images without labels: the dense model and one that computes less.

Each measure comes with its floor, what it is between two unrelated images, because a cosine of 0.7 may mean nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Words, type_error, value_error

NEIGHBOURS = 5
# Of the way from the dense outputs (0) to those of an unrelated image (1).
LITTLE, MUCH = 0.05, 0.2
MEASURES = {
    "cls": "cosine of the class token",
    "pooled": "cosine of the mean image token",
    "patch": "cosine of image tokens",
    "error": "squared error of image tokens, relative to their squares",
    "same_class": "same most likely class",
    "cls_nearest": "keeps the nearest neighbour, by class token",
    "cls_neighbours": f"overlap of {NEIGHBOURS} neighbours, by class token",
    "pooled_nearest": "keeps the nearest neighbour, by mean image token",
    "pooled_neighbours": f"overlap of {NEIGHBOURS} neighbours, by mean image token",
}


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model says of M images: tokens after the last norm [M, T, C], prefix tokens first, and class logits."""

    tokens: Tensor
    num_prefix_tokens: int
    logits: Tensor | None = None

    @property
    def cls(self) -> Tensor | None:  # [M, C]
        return self.tokens[:, 0] if self.num_prefix_tokens else None

    @property
    def image_tokens(self) -> Tensor:  # [M, N, C]
        return self.tokens[:, self.num_prefix_tokens :]

    @property
    def pooled(self) -> Tensor:  # [M, C]
        return self.image_tokens.mean(1)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Measures of each image, and their floors.

    Attributes:
        values: by name of ``MEASURES``, [M] each; without those that the outputs cannot have.
        floors: of each the mean over pairs of unrelated images; of neighbours, what chance keeps.
        names: of the images.
    """

    values: dict[str, Tensor]
    floors: dict[str, float]
    names: tuple[str, ...]

    def mean(self, measure: str) -> float:
        return float(self.values[measure].mean())

    def standard_error(self, measure: str) -> float:
        """Of the mean, over images; NaN of a single one."""
        of = self.values[measure]
        return float(of.std() / math.sqrt(len(of))) if len(of) > 1 else math.nan

    def worst(self, count: int = 5, measure: str = "patch") -> list[str]:
        """Names of the images that changed most, the worst first."""
        order = self.values[measure].argsort(descending=measure == "error", stable=True)
        return [self.names[i] for i in order[:count].tolist()]

    def distance(self) -> float:
        """How far the outputs moved: 0 is dense, 1 is as far as an unrelated image. The greatest over cosines."""
        cosines = [name for name in ("cls", "pooled", "patch") if name in self.values]
        return max((1 - self.mean(name)) / max(1 - self.floors[name], 1e-9) for name in cosines)

    def advice(self) -> str:
        far = self.distance()
        if far <= LITTLE:
            return f"The outputs change little ({far:.0%} of the way to an unrelated image)."
        if far <= MUCH:
            return (
                f"The outputs change ({far:.0%} of the way to an unrelated image): check what you use them for, or keep"
                " more tokens."
            )
        return (
            f"The outputs change much ({far:.0%} of the way to an unrelated image): keep more tokens, let idle tokens"
            ' follow (idle="follow"), or finetune.'
        )

    def table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("measure", no_wrap=True)
        for title in ("mean", "standard error", "worst image", "unrelated image"):
            table.add_column(title, justify="right", no_wrap=True)
        for name, words in MEASURES.items():
            if name in self.values:
                of = self.values[name]
                worst = float(of.max() if name == "error" else of.min())
                cells = (self.mean(name), self.standard_error(name), worst, self.floors[name])
                table.add_row(words, *(f"{value:.4f}" for value in cells))
        return table


def neighbours(features: Tensor, count: int) -> Tensor:
    """[M, C] -> [M, count] of the other images, the most similar (by cosine) first."""
    unit = F.normalize(features, dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :count]


def _neighbour_measures(dense: Tensor, idle: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the nearest neighbour stays [M], and the share of the nearest five that stays [M]."""
    count = min(NEIGHBOURS, len(dense) - 1)
    before, after = neighbours(dense, count), neighbours(idle, count)
    stays = (before.unsqueeze(2) == after.unsqueeze(1)).any(2)
    return (before[:, 0] == after[:, 0]).to(dense.dtype), stays.to(dense.dtype).mean(1)


def _unrelated(features: Tensor) -> float:
    """The mean cosine of features [M, N, C] at the same place of different images."""
    M, N, _ = features.shape
    if M < 2:
        return math.nan
    unit = F.normalize(features, dim=-1).flatten(1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (M * (M - 1) * N))


def _unrelated_error(features: Tensor) -> float:
    M = len(features)
    if M < 2:
        return math.nan
    flat = features.flatten(1).double()
    square = flat.square().sum(1)
    # The mean over j != i of |f_i - f_j|^2, relative to |f_i|^2.
    others = (square.sum() - square + (M - 1) * square - 2 * (flat @ flat.sum(0) - square)) / (M - 1)
    return float((others / square).mean())


def compare_outputs(dense: Outputs, idle: Outputs, names: Sequence[str] | None = None) -> Fidelity:
    """How near ``idle`` is to ``dense``, image by image.

    Raises:
        ValueError: they are of different images, tokens or classes.
    """
    op = "compare_outputs"
    if dense.tokens.shape != idle.tokens.shape:
        raise value_error(op, "idle", f"tokens {list(dense.tokens.shape)}, as dense has", idle.tokens)
    if dense.num_prefix_tokens != idle.num_prefix_tokens:
        wanted = f"{dense.num_prefix_tokens} prefix tokens, as dense has"
        raise value_error(op, "idle", wanted, Words(str(idle.num_prefix_tokens)))
    M = len(dense.tokens)
    names = tuple(str(i) for i in range(M)) if names is None else tuple(names)
    if len(names) != M:
        raise value_error(op, "names", f"one for each of the {M} images", Words(f"{len(names)} names"))
    values: dict[str, Tensor] = {}
    floors: dict[str, float] = {}
    pairs = {"pooled": (dense.pooled, idle.pooled)}
    if dense.cls is not None and idle.cls is not None:
        pairs = {"cls": (dense.cls, idle.cls), **pairs}
    for name, (a, b) in pairs.items():
        values[name], floors[name] = F.cosine_similarity(a, b, dim=-1), _unrelated(a.unsqueeze(1))
    before, after = dense.image_tokens, idle.image_tokens
    values["patch"], floors["patch"] = F.cosine_similarity(before, after, dim=-1).mean(1), _unrelated(before)
    values["error"] = (after - before).square().sum((1, 2)) / before.square().sum((1, 2)).clamp(min=1e-30)
    floors["error"] = _unrelated_error(before)
    if dense.logits is not None and idle.logits is not None and dense.logits.shape[1] > 1:
        classes = dense.logits.argmax(1)
        values["same_class"] = (classes == idle.logits.argmax(1)).to(before.dtype)
        shares = classes.bincount().double() / M
        floors["same_class"] = float(((shares * M - 1) * shares).sum() / (M - 1)) if M > 1 else math.nan
    if M > 1:
        for name, (a, b) in pairs.items():
            values[f"{name}_nearest"], values[f"{name}_neighbours"] = _neighbour_measures(a, b)
            floors[f"{name}_nearest"] = 1 / (M - 1)
            floors[f"{name}_neighbours"] = min(NEIGHBOURS, M - 1) / (M - 1)
    return Fidelity({name: v.detach().cpu() for name, v in values.items()}, floors, names)


def outputs_of(model: Any, images: Tensor, batch_size: int = 32) -> Outputs:
    """Of a timm model with ``forward_features`` and ``forward_head``, idle or not, or of one like it.

    Raises:
        TypeError: the model is not of that kind.
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        wanted = "a model with forward_features and forward_head, as timm's have"
        raise type_error("outputs_of", "model", wanted, Words(type(model).__name__))
    device = next((p.device for p in model.parameters()), images.device)
    tokens, logits = [], []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            found = model.forward_features(batch.to(device))
            logits.append(model.forward_head(found).float().cpu())
            tokens.append((found if found.dim() == 3 else found.flatten(1, -2)).float().cpu())
    all_logits = torch.cat(logits)
    has_classes = getattr(model, "num_classes", 0) > 1
    return Outputs(torch.cat(tokens), getattr(model, "num_prefix_tokens", 0), all_logits if has_classes else None)


def compare(
    dense: nn.Module,
    idle: nn.Module,
    images: Tensor,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
    outputs: Callable[[Any, Tensor, int], Outputs] = outputs_of,
) -> Fidelity:
    """How near the outputs of an idle model are to those of the dense one, on images without labels.

    Args:
        dense, idle: models that take the images; both are put into eval mode for the measurement.
        images: [M, 3, H, W], preprocessed. Neighbours and floors need two and more.
        names: of the images, to name the worst.
        batch_size: images at a time.
        outputs: how a model's ``Outputs`` are found, where it is not one of timm's.

    Raises:
        TypeError, ValueError: images are none, or the models' outputs have different shapes.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise type_error("compare", "images", "a tensor [M, channels, height, width]", images)
    if not len(images):
        raise value_error("compare", "images", "at least one image", images)
    found = []
    for model in (dense, idle):
        training = {module for module in model.modules() if module.training}
        model.eval()
        try:
            found.append(outputs(model, images, batch_size))
        finally:
            for module in training:
                module.training = True
    return compare_outputs(found[0], found[1], names)
