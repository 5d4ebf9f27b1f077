"""Dense prediction on an idle backbone: semantic segmentation, dense against idle, in a few minutes on two CPU cores.

    python -m pip install -e ".[examples]"
    python examples/segmentation.py

Idle tokens keep their place, so a backbone that ``apply_idle`` made idle still returns whole feature maps, and any
decoder fits on top: here four maps of a small ViT (timm's ``features_only``) and a few convolutions. The images are
made of pictures that scikit-image and scikit-learn bring along: discs and polygons of brick, grass and gravel lie on
crops of photographs. Test images use other photographs and the other halves of the textures than training images.

For each seed a dense model is trained first. From its weights a dense and an idle copy are then trained on, with the
same images, steps and learning rates. The table gives their mean intersection over union on the same test images, that
of the idle copy before it was trained on, and images per second of the two, timed in alternation. The class token,
whose attention selects the tokens, has no task of its own here: nothing teaches it to look at the objects.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import skimage.draw
import sklearn.datasets
import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.block.timing import alternate
from idlevit_kernels.models.recording import selections

# Each class and the colour of its textures; a photograph has its own.
CLASSES = {"photograph": None, "brick": (0.62, 0.42, 0.36), "grass": (0.42, 0.54, 0.32), "gravel": (0.50, 0.48, 0.52)}
console = Console()


@functools.cache
def pictures(train: bool) -> list[list[np.ndarray]]:
    """For each class the pictures that it is cut from, [H, W, 3] in [0, 1]; textures are grey."""
    china, flower = sklearn.datasets.load_sample_images().images
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), china]
    if not train:
        photographs = [skimage.data.coffee(), skimage.data.rocket(), flower]
    textures = [skimage.data.brick(), skimage.data.grass(), skimage.data.gravel()]
    half = textures[0].shape[0] // 2
    textures = [np.repeat((texture[:half] if train else texture[half:])[..., None], 3, axis=2) for texture in textures]
    return [[p / 255 for p in source] for source in (photographs, *([texture] for texture in textures))]


def cut(kind: int, size: int, train: bool, random: np.random.Generator) -> np.ndarray:
    """A square [size, size, 3] of a picture of that class, turned and mirrored, of random contrast and colour."""
    sources = pictures(train)[kind]
    picture = sources[random.integers(len(sources))]
    top, left = (random.integers(edge - size + 1) for edge in picture.shape[:2])
    square = np.rot90(picture[top : top + size, left : left + size], random.integers(4))[:, :: random.choice((-1, 1))]
    mean = square.mean((0, 1))
    colour = mean if kind == 0 else np.array(list(CLASSES.values())[kind])
    return (square - mean) * random.uniform(0.6, 1.4) + colour + random.normal(0, 0.08, 3)


def outline(size: int, random: np.random.Generator) -> np.ndarray:
    """A boolean [size, size]: the inside of a disc, or of a polygon with 3 to 6 corners."""
    inside = np.zeros((size, size), dtype=bool)
    row, column = random.uniform(0.1, 0.9, 2) * size
    radius, corners = random.uniform(0.15, 0.35) * size, random.integers(2, 7)
    if corners == 2:
        inside[skimage.draw.disk((row, column), radius, shape=inside.shape)] = True
    else:
        turns = np.arange(corners) / corners * 2 * math.pi + random.uniform(0, 2 * math.pi)
        rows, columns = row + radius * np.sin(turns), column + radius * np.cos(turns)
        inside[skimage.draw.polygon(rows, columns, inside.shape)] = True
    return inside


def scenes(count: int, size: int, train: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, size, size] in about [-1, 1] and the class of each pixel [count, size, size]."""
    random = np.random.default_rng(seed)
    images, classes = np.empty((count, size, size, 3), np.float32), np.zeros((count, size, size), np.int64)
    for image, labels in zip(images, classes, strict=True):
        image[:] = cut(0, size, train, random)
        for kind in random.integers(1, len(CLASSES), size=random.integers(1, 5)):
            inside = outline(size, random)
            image[inside] = cut(kind, size, train, random)[inside]
            labels[inside] = kind
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1, torch.from_numpy(classes)


class Segmenter(nn.Module):
    """A backbone that returns feature maps, and a decoder that sees nothing else."""

    def __init__(self, backbone: nn.Module, width: int = 64):
        super().__init__()
        self.backbone = backbone
        stride = backbone.feature_info.reduction()[-1]
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.decoder = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 16 * (stride // 2) ** 2, 1),
            nn.PixelShuffle(stride // 2),
            nn.GELU(),
            nn.Conv2d(16, len(CLASSES), 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes, H, W]."""
        maps = self.backbone(image)  # each [B, C, H / stride, W / stride], every token at its own place
        x = sum(layer(features) for layer, features in zip(self.lateral, maps, strict=True))
        return F.interpolate(self.decoder(x), image.shape[-2:], mode="bilinear")


def segmenter(size: int, width: int) -> Segmenter:
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=(1, 3, 5, 7),
        img_size=size,
        patch_size=8,
        depth=8,
        embed_dim=width,
        num_heads=width // 32,
    )
    return Segmenter(backbone)


def train(model: nn.Module, steps: int, batch: int, size: int, lr: float, seed: int, what: str) -> float:
    """Trains on ``steps`` batches that nobody saw before; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    seconds = 0.0
    for step in track(range(steps), what, console=console):
        images, classes = scenes(batch, size, train=True, seed=seed * 1_000_000 + step)
        begin = time.perf_counter()
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - begin
    model.eval()
    return seconds


@torch.inference_mode()
def mean_iou(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Intersection over union of each class over all pixels of all images, averaged over the classes, in percent."""
    predicted = torch.cat([model(chunk).argmax(1) for chunk in images.split(32)])
    pairs = torch.bincount((classes * len(CLASSES) + predicted).flatten(), minlength=len(CLASSES) ** 2)
    confusion = pairs.reshape(len(CLASSES), len(CLASSES)).double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * float((confusion.diagonal() / union)[union > 0].mean())


@dataclasses.dataclass
class Result:
    """Of one seed: mean IoU in percent of each model by name, training images a second, and the models."""

    mean_iou: dict[str, float]
    training_rate: dict[str, float]
    dense: Segmenter
    idle: Segmenter


def picture(path: Path, result: Result, images: Tensor, classes: Tensor) -> None:
    """A row for each image: input, truth, both predictions, and the tokens that two of the idle layers computed."""
    import matplotlib.pyplot as plt

    layers = selections(result.idle, images)  # of each image
    with torch.inference_mode():
        predictions = [model(images).argmax(1) for model in (result.dense, result.idle)]
    titles = ["input", "truth", "dense", "idle", "computed, first idle layer", "computed, last idle layer"]
    figure, rows = plt.subplots(len(images), len(titles), figsize=(2 * len(titles), 2.1 * len(images)), squeeze=False)
    for i, axes in enumerate(rows):
        image = (images[i].permute(1, 2, 0) / 2 + 0.5).clip(0, 1).numpy()
        axes[0].imshow(image)
        for axis, labels in zip(axes[1:4], (classes[i], *(p[i] for p in predictions)), strict=True):
            axis.imshow(labels.numpy(), vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
        for axis, layer in zip(axes[4:], (layers[i][0], layers[i][-1]), strict=True):
            kept = F.interpolate(layer.kept[None, None].float(), image.shape[:2], mode="nearest")[0, 0, ..., None]
            axis.imshow(image * (0.15 + 0.85 * kept.numpy()))
        for axis, title in zip(axes, titles, strict=True):
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(
    seed: int, test: tuple[Tensor, Tensor], keep_ratio: float, steps: int, more_steps: int, batch: int, width: int
) -> Result:
    size = test[0].shape[-1]
    torch.manual_seed(seed)
    dense = segmenter(size, width)
    train(dense, steps, batch, size, 1.5e-3, 2 * seed, f"seed {seed}, dense")
    idle = copy.deepcopy(dense)
    ik.apply_idle(idle.backbone, keep_ratio=keep_ratio)
    result = Result({}, {}, dense, idle)
    result.mean_iou["idle, before it is trained on"] = mean_iou(idle, *test)
    for name, model in (("dense", dense), ("idle", idle)):
        seconds = train(model, more_steps, batch, size, 5e-4, 2 * seed + 1, f"seed {seed}, {name}, trained on")
        result.training_rate[name] = more_steps * batch / seconds
        result.mean_iou[name] = mean_iou(model, *test)
    return result


def report(results: list[Result], chunk: Tensor, seconds: float) -> None:
    dense, idle = results[-1].dense, results[-1].idle
    with torch.inference_mode():
        timings = alternate({"dense": lambda: dense(chunk), "idle": lambda: idle(chunk)}, seconds)
    table = Table(caption=f"± standard error of the mean of {len(results)} seeds; images/s: 20th to 80th percentile")
    table.add_column("model")
    for column in ("GMACs", "mean IoU, %", f"images/s, batch {len(chunk)}", "training images/s"):
        table.add_column(column, justify="right")
    for name in ("dense", "idle", "idle, before it is trained on"):
        values = [result.mean_iou[name] for result in results]
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
        row = [name, "", f"{statistics.mean(values):.1f}{error}"]
        if name in timings:
            macs = ik.count_macs({"dense": dense, "idle": idle}[name], tuple(chunk.shape[1:])).total
            row[1] = f"{macs / 1e9:.3f}"
            low, middle, high = (len(chunk) / t for t in (timings[name].p80, timings[name].median, timings[name].p20))
            row.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
            row.append(f"{statistics.mean(result.training_rate[name] for result in results):.0f}")
        table.add_row(*row)
    console.print(table)
    pairs = [f"{result.mean_iou['idle'] - result.mean_iou['dense']:+.1f}" for result in results]
    console.print(f"idle - dense, seed by seed: {', '.join(pairs)}")
    console.print(f"idle / dense, images/s: {timings['dense'].median / timings['idle'].median:.2f}")


def main(
    keep_ratio: Annotated[float, typer.Option(help="Share of the tokens that the first idle stage computes.")] = 0.7,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own weights and images.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Dense training steps before the comparison.")] = 240,
    more_steps: Annotated[int, typer.Option(min=1, help="Further steps, of the dense and the idle copy alike.")] = 80,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step, and of a timed call.")] = 16,
    size: Annotated[int, typer.Option(help="Pixels of an image's side, a multiple of 8.")] = 96,
    width: Annotated[int, typer.Option(help="Channels of the backbone, a multiple of 32.")] = 96,
    test_images: Annotated[int, typer.Option(min=1)] = 200,
    seconds: Annotated[float, typer.Option(help="How long to time the two models.")] = 10.0,
    output: Annotated[Path, typer.Option(help="The picture of some test images.")] = Path("segmentation.png"),
) -> None:
    """Trains, compares and draws; see the top of the file."""
    test = scenes(test_images, size, train=False, seed=0)
    results = [compare(s, test, keep_ratio, steps, more_steps, batch, width) for s in range(1, seeds + 1)]
    report(results, test[0][:batch], seconds)
    picture(output, results[-1], *(t[:5] for t in test))
    console.print(f"{output}: some test images")


if __name__ == "__main__":
    typer.run(main)
