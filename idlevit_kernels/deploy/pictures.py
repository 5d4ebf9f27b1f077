"""Pictures of idling: which tokens each layer keeps, how often each is chosen, which come back, what scored them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Words, type_error, value_error
from ..models.inputs import default_input_size
from ..models.recording import Layer, selections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IN_DETAIL = 5  # layers in a row; more go to the next rows
_IN_GALLERY = 9
_INCH = 1.3  # of one picture


def visualize(model: nn.Module, image: Any) -> Figure:
    """Draws what idles: for one image every layer in detail, for several one row each.

    One image: the tokens that each idle layer keeps (veiled: idle; blue: kept again after having been idle in the idle
    layer before), the scores that ranked them, how often each token is chosen, and how often it comes back. Several:
    the same without scores, nine layers at most.

    Args:
        model: idle, as in ``selections``.
        image: a PIL image, a path, an array [height, width, 3] of bytes (these are resized, cropped and normalised as
            the model wants it), a tensor [channels, height, width] as the model takes it, or a list of these.

    Returns:
        A matplotlib Figure: ``figure.savefig("idling.png")``.

    Raises:
        TypeError, ValueError: the model is not idle, or the image is none of these.
        OSError: a file that cannot be read.
        ModuleNotFoundError: matplotlib is not installed.
    """
    many = list(image) if isinstance(image, (list, tuple)) else [image]
    if not many:
        raise value_error("visualize", "image", "an image, or a list with at least one", image)
    prepared = [_prepare(model, one) for one in many]
    tensors, pictures = zip(*prepared, strict=True)
    if len({t.shape for t in tensors}) != 1:
        raise value_error("visualize", "image", "images of one size", [tuple(t.shape) for t in tensors])
    layers = selections(model, torch.stack(tensors))
    return _detail(pictures[0], layers[0]) if len(many) == 1 else _gallery(pictures, layers)


def _prepare(model: nn.Module, image: Any) -> tuple[Tensor, np.ndarray]:
    """The image as the model takes it, on its device, and as a picture [height, width, 3] in [0, 1]."""
    like = next(model.parameters()) if isinstance(model, nn.Module) else torch.empty(0)
    if isinstance(image, Tensor):
        if image.dim() != 3 or not image.is_floating_point():
            raise value_error("visualize", "image", "a float tensor [channels, height, width]", image)
        low, high = image.amin(), image.amax()
        picture = ((image - low) / (high - low).clamp(min=1e-12)).expand(3, -1, -1) if len(image) in (1, 3) else None
        if picture is None:
            raise value_error("visualize", "image", "of 1 or 3 channels", image)
        return image.to(like.device, like.dtype), picture.movedim(0, 2).float().cpu().numpy()
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        expected = "a PIL image, a path, an array [height, width, 3] of bytes or a tensor [channels, height, width]"
        raise type_error("visualize", "image", expected, image)
    size = default_input_size(model)
    if size[0] != 3:
        expected = f"a tensor [channels, height, width] for a model of {size[0]} channel{'s' * (size[0] > 1)}"
        raise value_error("visualize", "image", expected, Words("a picture"))
    config = resolve_model_data_config(model) | {"input_size": size}
    tensor = create_transform(**config, is_training=False)(image.convert("RGB"))
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    picture = (tensor * std + mean).clamp(0, 1).movedim(0, 2).numpy()
    return tensor.to(like.device, like.dtype), picture


def _figure(rows: int, columns: int, title: str) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("visualize needs matplotlib: pip install 'idlevit-kernels[bench]'") from error
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(_INCH * columns, (_INCH + 0.16) * rows + 0.25), layout=layout, dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure, axes


_TITLE = "veiled: idle; blue: kept again after being idle in the idle layer before"


def _detail(picture: np.ndarray, layers: Sequence[Layer]) -> Figure:
    columns = min(len(layers), _IN_DETAIL)
    rows = -(-len(layers) // columns)
    left = 1 if rows > 1 else 2
    figure, axes = _figure(2 * rows, left + columns, f"Tokens that idle layers keep, and their scores ({_TITLE})")
    corner = axes[:, :left].T.flat if left == 1 else (axes[0, 0], axes[1, 0], axes[1, 1])
    chosen, again = _history(layers)
    most = max(1, int(again.max()))
    _show(corner[0], picture, "image")
    _heat(corner[1], chosen, f"chosen, 0 to {len(layers)} times", len(layers))
    _heat(corner[2], again, f"back, 0 to {most} times", most)
    before = None
    for i, layer in enumerate(layers):
        row, column = 2 * (i // columns), left + i % columns
        _kept(axes[row, column], picture, layer, before)
        _heat(axes[row + 1, column], layer.scores.numpy(), "scores", None)
        before = layer
    return figure


def _gallery(pictures: Sequence[np.ndarray], layers: Sequence[Sequence[Layer]]) -> Figure:
    count = len(layers[0])
    shown = sorted(
        {round(i * (count - 1) / max(1, min(count, _IN_GALLERY) - 1)) for i in range(min(count, _IN_GALLERY))}
    )
    figure, axes = _figure(len(pictures), 3 + len(shown), f"Tokens that idle layers keep ({_TITLE})")
    for row, picture, of_image in zip(axes, pictures, layers, strict=True):
        chosen, again = _history(of_image)
        _show(row[0], picture, "image")
        _heat(row[1], chosen, f"chosen, 0 to {count} times", count)
        _heat(row[2], again, f"back, 0 to {max(1, int(again.max()))} times", max(1, int(again.max())))
        for axis, i in zip(row[3:], shown, strict=True):
            _kept(axis, picture, of_image[i], of_image[i - 1] if i else None)
    return figure


def _history(layers: Sequence[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """How many layers choose each token, and how many choose it after the one before did not, on the finest grid."""
    finest = max((layer.kept.shape for layer in layers), key=math.prod)
    kept = np.stack([_resized(layer.kept, finest) for layer in layers])
    return kept.sum(0), (kept[1:] & ~kept[:-1]).sum(0) if len(kept) > 1 else np.zeros(finest, int)


def _resized(grid: Tensor, size: Sequence[int]) -> np.ndarray:
    """A grid of a later stage on a finer one, or the other way round: each place takes the nearest token's value."""
    h, w = grid.shape
    rows, columns = (torch.arange(n) * m // n for n, m in zip(size, (h, w), strict=True))
    return grid[rows[:, None], columns].numpy()


def _show(axis: Any, picture: np.ndarray, title: str, extent: Any = None) -> None:
    axis.imshow(picture, extent=extent, interpolation="nearest")
    axis.set_title(title, fontsize=7, pad=2)


def _heat(axis: Any, values: np.ndarray, title: str, most: int | None) -> None:
    axis.imshow(values, cmap="viridis", vmin=0 if most else None, vmax=most, interpolation="nearest")
    axis.set_title(title, fontsize=7, pad=2)


def _kept(axis: Any, picture: np.ndarray, layer: Layer, before: Layer | None) -> None:
    h, w = layer.kept.shape
    number = ".".join(part for part in layer.name.split(".") if part.isdigit())
    _show(axis, picture, f"layer {number}: {int(layer.kept.sum())} of {h * w}", extent=(0, w, h, 0))
    veil = np.zeros((h, w, 4))
    veil[~layer.kept.numpy()] = (1, 1, 1, 0.82)
    if before is not None:
        veil[layer.kept.numpy() & ~_resized(before.kept, (h, w))] = (0, 0.35, 1, 0.4)
    axis.imshow(veil, extent=(0, w, h, 0), interpolation="nearest")
