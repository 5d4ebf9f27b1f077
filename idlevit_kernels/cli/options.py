"""Options that several commands have."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import value_error
from ..train.recipe import Recipe

MODEL = typer.Option(help="Name of a timm model, or of this package's LV-ViT.")
KEEP_RATIO = typer.Option(help="Keep ratio of the first idle stage; 0.7 if no schedule is given.")
SCHEDULE = typer.Option(metavar="FILE", help="JSON with a keep ratio for each layer, as `idlevit tune` writes it.")
WEIGHTS = typer.Option(metavar="FILE", help="A released checkpoint or a state dict; by default random weights.")
PRETRAINED = typer.Option("--pretrained", help="timm's weights, which it downloads.")
DataDir = Annotated[Path | None, typer.Option(help="Where a data set that timm knows by name lies.")]
Download = Annotated[bool, typer.Option("--download", help="Download that data set if it is not there.")]
ValSplit = Annotated[str, typer.Option(help="Its split that accuracy is measured on.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the best there is.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each process that trains.")]
OnBadImage = Annotated[str, typer.Option(help="At an image that cannot be read: stop, or skip it and count it.")]


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command an option for each field of Recipe; it gets those that were used as ``given``."""
    fields = dataclasses.fields(Recipe)
    hints = get_type_hints(Recipe)

    @functools.wraps(command)
    def run(**options: Any) -> None:
        values = {field.name: options.pop(field.name) for field in fields}
        command(given={name: value for name, value in values.items() if value is not None}, **options)

    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    for field in fields:
        text = f"{field.metadata['help']} [{field.default}; {field.metadata['source']}]"
        option = typer.Option(help=text.replace("[", "\\["), show_default=False, rich_help_panel="Recipe")
        annotation: Any = Annotated[hints[field.name] | None, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def skips(op: str, on_bad_image: str) -> bool:
    if on_bad_image not in ("stop", "skip"):
        raise value_error(op, "on_bad_image", "stop or skip", on_bad_image)
    return on_bad_image == "skip"
