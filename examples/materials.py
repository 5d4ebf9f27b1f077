"""A folder of images to train on without a download: ``python examples/materials.py FOLDER``.

    python examples/materials.py materials
    idlevit train --data materials --output run ...    # bench/plot.py has the whole command
    idlevit visualize --run run

Each image is a photograph that scikit-image or scikit-learn brings along, on which discs and polygons of one material
lie: brick, grass or gravel, the class. So the class token, whose attention selects the tokens, has something to look
for, and the rest of the image may idle. Test images use other photographs and the other halves of the textures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track
from segmentation import CLASSES, outline, square

MATERIALS = [name for name, colour in CLASSES.items() if colour is not None]


def image(material: str, size: int, train: bool, random: np.random.Generator) -> Image.Image:
    """A photograph with two to four objects of the material, [size, size]."""
    picture = square(0, size, train, random)
    for _ in range(random.integers(2, 5)):
        inside = outline(size, random)
        picture[inside] = square(list(CLASSES).index(material), size, train, random)[inside]
    return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))


def main(
    folder: Annotated[Path, typer.Argument(help="Where train/ and val/ are made.")],
    train: Annotated[int, typer.Option(min=1, help="Training images of each class.")] = 600,
    val: Annotated[int, typer.Option(min=1, help="Validation images of each class.")] = 100,
    size: Annotated[int, typer.Option(min=32, max=256, help="Pixels of an image's side.")] = 160,
) -> None:
    """Writes PNG files, by class; the same ones each time, over those of the same names."""
    for split, count in (("train", train), ("val", val)):
        for number, material in enumerate(MATERIALS):
            random = np.random.default_rng((number, split == "train"))
            target = folder / split / material
            target.mkdir(parents=True, exist_ok=True)
            for i in track(range(count), f"{split}, {material}"):
                image(material, size, split == "train", random).save(target / f"{i:04d}.png")


if __name__ == "__main__":
    typer.run(main)
