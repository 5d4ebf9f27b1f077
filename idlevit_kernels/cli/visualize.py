"""``idlevit visualize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..deploy.pictures import visualize as draw
from ..errors import value_error
from ..models import apply_idle
from ..schedule import read_schedule
from ..train.task import Place, load_run, open_run_data, some_images
from .options import KEEP_RATIO, MODEL, PRETRAINED, SCHEDULE, WEIGHTS, DataDir, Download, ValSplit
from .shared import bad_input, dense_and_idle, failed_run

_FORMATS = (".png", ".svg", ".pdf")
_DRAWN = 4  # images of a run, where none are named


def visualize(
    context: typer.Context,
    image: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="One: in detail. Several: a row each. None: some of --run's data."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="PNG, SVG or PDF.")] = Path(
        "idling.png"
    ),
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What `idlevit train --output DIR` trained, or one of its checkpoints."),
    ] = None,
    model: Annotated[str, MODEL] = "deit_small_patch16_224",
    keep_ratio: Annotated[float | None, KEEP_RATIO] = None,
    schedule: Annotated[Path | None, SCHEDULE] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    weights: Annotated[Path | None, WEIGHTS] = None,
    pretrained: Annotated[bool, PRETRAINED] = False,
    data_dir: DataDir = None,
    download: Download = False,
    val_split: ValSplit = "validation",
) -> None:
    """Draws which tokens each idle layer keeps, how often each is chosen, which come back, and their scores."""
    images: list[Any] = list(image or [])
    with bad_input(), failed_run():
        if output.suffix.lower() not in _FORMATS:
            raise value_error("visualize", "output", f"a file that ends in {', '.join(_FORMATS)}", str(output))
        if run is None:
            if not images:
                raise value_error("visualize", "IMAGE", "a file, or several (or pass --run)", None)
            _, idle, _ = dense_and_idle("visualize", model, keep_ratio, schedule, image_size, weights, pretrained)
        else:
            for name in ("model", "image_size", "weights", "pretrained"):
                if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                    raise value_error("visualize", name, "left out where --run is given", context.params[name])
            recipe, dense = load_run("visualize", run)
            given = {"keep_ratio": keep_ratio, "schedule": schedule and read_schedule("visualize", schedule)}
            given = {name: value for name, value in given.items() if value is not None}
            if not given and recipe.keep_ratio == 1:
                raise value_error("visualize", "keep_ratio", "given: the run trained a dense model", None)
            idle = apply_idle(dense.eval().requires_grad_(False), **(given or recipe.idle))
            if not images:
                images = some_images(open_run_data(recipe, Place(data_dir, download, val_split)), _DRAWN)
        draw(idle, images).savefig(output)
    trained = run is not None or weights is not None or pretrained
    print(
        f"{output}{'' if trained else ' (random weights: what they choose says nothing; see --weights, --pretrained)'}"
    )
