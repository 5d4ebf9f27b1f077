"""What `idlevit train` and `idlevit eval` do, and what a run leaves for others."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..block.timing import alternate
from ..errors import ArgumentValueError, value_error
from ..measure.machine import set_threads
from ..measure.macs import count_macs
from ..models import apply_idle
from ..models.create import check_model_name
from ..schedule import check_ratio
from . import checkpoint
from .data import Data, open_data, val_loader
from .distributed import World
from .engine import Options, Score, Trainer, autocast, evaluate
from .models import create_model
from .recipe import Recipe, recipe_for
from .report import Report, show

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run takes its images from and what it runs on.

    Attributes:
        data_dir, download, val_split: of a data set that timm knows by name, as in ``open_data``.
        device: as in ``World.join``.
        threads: of the CPU; None for as many as PyTorch takes.
        seconds: to measure the images per second of the last table for.
    """

    data_dir: Path | None = None
    download: bool = False
    val_split: str = "validation"
    device: str | None = None
    threads: int | None = None
    seconds: float = 2.0


def train(given: dict[str, Any], options: Options, place: Place, resume: str | None = None) -> list[Row]:
    """Trains by the recipe for ``given``; under torchrun, together with the other processes.

    Where the recipe starts from "dense" weights, the dense model is trained first, in ``dense`` of the output.

    Args:
        given: fields of ``Recipe`` that are not to have their default.
        resume: "auto" to go on from what the output directory holds, if anything; a checkpoint; or None for a new run.

    Returns:
        The rows of the last table: the dense model, the idle one before and after.

    Raises:
        TypeError, ValueError, OSError, CheckpointError: an argument or a file that does not fit.
        Stopped, NonFiniteLoss, UnreadableImage: see ``Trainer.fit``.
    """
    recipe = recipe_for(given)
    world = _join(place)
    console = Console(stderr=True, quiet=not world.first)
    try:
        _check_output(options.output, resume, world)
        torch.manual_seed(recipe.seed + world.rank)
        data = open_run_data(recipe, place)
        start: str | None = recipe.weights
        if recipe.weights == "dense":
            first = recipe_for({**given, "keep_ratio": 1.0, "weights": "none"}, only=("data", "model", "seed", "dtype"))
            torch.manual_seed(recipe.seed)  # the same weights in all processes
            dense = create_model(first, data.num_classes, None)
            inside = options.output and options.output / "dense"
            stage = dataclasses.replace(options, output=inside)
            _fit("dense", Trainer(first, dense, data, world, options=stage), "auto" if resume else None, console)
        else:
            torch.manual_seed(recipe.seed)
            dense = create_model(recipe, data.num_classes, None if start == "none" else start)
        dense.eval().requires_grad_(False)
        model = copy.deepcopy(dense).requires_grad_(True)
        if recipe.keep_ratio < 1:
            apply_idle(model, **recipe.idle)
        teacher: nn.Module | None = None
        if recipe.distill_weight and recipe.keep_ratio < 1:
            teacher = copy.deepcopy(dense) if recipe.teacher is None else _teacher(recipe, data)
        torch.manual_seed(recipe.seed + world.rank)
        trainer = Trainer(recipe, model, data, world, teacher, options)
        name = "dense" if recipe.keep_ratio == 1 else f"idle {recipe.schedule or f'{recipe.keep_ratio:g}'}"
        _fit(name, trainer, resume, console)

        models = {"dense, at the start": dense.to(world.device)}
        if recipe.keep_ratio < 1:
            models["idle, before"] = apply_idle(copy.deepcopy(dense), **recipe.idle)
        models[f"{name.partition(' ')[0]}, trained"] = trainer.model
        models[f"{name.partition(' ')[0]}, moving average"] = trainer.ema.module
        rows = compare(models, data, world, recipe.dtype, 2 * trainer.batches.size, options, place.seconds)
        if world.first:
            show(rows, _title(recipe, data, trainer.unreadable))
        return rows
    finally:
        world.leave()


def evaluate_run(
    source: Path | None, given: dict[str, Any], keep_ratios: list[float], ema: bool, options: Options, place: Place
) -> list[Row]:
    """Accuracy and speed of a model, dense and idle at each keep ratio.

    Args:
        source: a checkpoint of ``train``, or the directory of a run; None for the weights that ``given`` names.
        given: fields of ``Recipe``, over those of the checkpoint.
        keep_ratios: by default the one it was trained with.
        ema: take the moving average of the weights.
    """
    world = _join(place)
    try:
        if source is not None:
            recipe, model = load_run("eval", source, given, ema)
            data = open_run_data(recipe, place)
        else:
            recipe = recipe_for(given)
            if recipe.weights == "dense":
                expected = "a checkpoint or the directory of a run, or pass --weights"
                raise value_error("eval", "source", expected, source)
            data = open_run_data(recipe, place)
            model = create_model(recipe, data.num_classes, None if recipe.weights == "none" else recipe.weights)
        model.eval().requires_grad_(False).to(world.device)
        models = {"dense": model}
        if recipe.schedule is not None and not keep_ratios:
            models["idle, as trained"] = apply_idle(copy.deepcopy(model), **recipe.idle)
        for ratio in keep_ratios or ([recipe.keep_ratio] if recipe.schedule is None else []):
            if check_ratio("eval", ratio) < 1:
                models[f"idle, {ratio:g}"] = apply_idle(copy.deepcopy(model), ratio)
        batch = max(1, min(64, recipe.batch_size // world.size))
        rows = compare(models, data, world, recipe.dtype, batch, options, place.seconds)
        if world.first:
            show(rows, _title(recipe, data))
        return rows
    finally:
        world.leave()


def load_run(op: str, source: Path, given: dict[str, Any] | None = None, ema: bool = False) -> tuple[Recipe, nn.Module]:
    """What a run of ``train`` left: its recipe, and the dense model with the trained weights.

    Args:
        source: a checkpoint, or the directory of the run, whose newest is taken.
        given, ema: as in ``evaluate_run``.
    """
    if source.is_dir():
        found = checkpoint.newest(source)
        if found is None:
            raise value_error(op, "source", "a checkpoint or a directory that holds one", str(source))
        state = found[1]
    else:
        state = checkpoint.load(source)
    known = {f.name for f in dataclasses.fields(Recipe)}
    recipe = recipe_for({k: v for k, v in state["recipe"].items() if k in known} | (given or {}))
    model = create_model(recipe, state["num_classes"], None)
    model.load_state_dict(state["model_ema" if ema else "model"])
    return recipe, model


def some_images(data: Data, count: int) -> list[Tensor]:
    """Images of the validation data, far from each other, as the model takes them [channels, height, width].

    Raises:
        ValueError: one of them cannot be read.
    """
    total: int = len(data.val)  # type: ignore[arg-type]
    samples = [data.val[i, (i,)] for i in range(0, total, max(1, total // count))][:count]
    unreadable = [name for sample in samples for name in sample.unreadable]
    if unreadable:
        raise ArgumentValueError(f"visualize: {unreadable[0]}; repair it, or name the images to draw")
    return [sample.image for sample in samples]


def compare(
    models: dict[str, Any], data: Data, world: World, dtype: str, batch: int, options: Options, seconds: float
) -> list[Row]:
    """Accuracy, multiply-accumulates and speed of each; the speeds in alternation, in the first process."""
    loader = val_loader(data, batch, world, options.workers)
    scores: dict[str, Score] = {}
    for name, model in models.items():
        scores[name] = evaluate(model, loader, world, dtype, options.skip_unreadable)
    speeds = dict.fromkeys(models, float("nan"))
    if world.first:
        inputs = torch.randn(batch, *data.input_size, device=world.device)
        calls = {name: (lambda model=model: model(inputs)) for name, model in models.items()}
        modes = {name: model.training for name, model in models.items()}
        with torch.inference_mode(), autocast(world.device, dtype):
            for model in models.values():
                model.eval()
            timings = alternate(calls, seconds, 3, world.device)
            for name, model in models.items():
                model.train(modes[name])
        speeds = {name: batch / timing.median for name, timing in timings.items()}
    return [
        {
            "model": name,
            "top-1": round(scores[name].top1, 2),
            "top-5": round(scores[name].top5, 2),
            "images": scores[name].images,
            "GMACs": count_macs(model, data.input_size).total / 1e9,
            "images/s": world.from_first(speeds)[name],
        }
        for name, model in models.items()
    ]


def _join(place: Place) -> World:
    set_threads("train", place.threads)
    return World.join(place.device)


def open_run_data(recipe: Recipe, place: Place) -> Data:
    """The data that the recipe names, as its model wants the images."""
    from timm.data import resolve_model_data_config
    from timm.models import PretrainedCfg, get_pretrained_cfg

    if (recipe.data == "digits") != (recipe.model == "digits_vit"):
        raise value_error("train", "model", "digits_vit for data 'digits', and another for other data", recipe.model)
    config: dict[str, Any] = {}
    if recipe.data != "digits":
        check_model_name("train", recipe.model)
        known = get_pretrained_cfg(recipe.model) or PretrainedCfg()
        config = resolve_model_data_config(None, pretrained_cfg=known.to_dict())
    return open_data(recipe, config, place.data_dir, place.download, place.val_split)


def _teacher(recipe: Recipe, data: Data) -> nn.Module:
    """A file with weights of the same architecture, or a pretrained timm model."""
    assert recipe.teacher is not None
    if Path(recipe.teacher).exists():
        return create_model(recipe, data.num_classes, recipe.teacher)
    return create_model(dataclasses.replace(recipe, model=recipe.teacher), data.num_classes, "pretrained")


def _check_output(output: Path | None, resume: str | None, world: World) -> None:
    """One directory, one run. All processes learn what the first one sees."""
    problem: Exception | None = None
    if output is None:
        if resume is not None:
            problem = value_error("train", "resume", "given with --output", resume)
    elif world.first:
        try:
            if resume not in (None, "auto"):
                Path(resume).stat()  # now, not after the dense model is trained
            output.mkdir(parents=True, exist_ok=True)
            held = checkpoint.paths(output) + checkpoint.paths(output / "dense")
            if held and resume is None:
                expected = "a directory without checkpoints (or pass --resume auto to go on)"
                problem = value_error("train", "output", expected, str(held[0]))
        except OSError as error:
            problem = error
    problem = world.from_first(problem)
    if problem is not None:
        raise problem


def _fit(name: str, trainer: Trainer, resume: str | None, console: Console) -> None:
    output, world = trainer.options.output, trainer.world
    if resume is not None and trainer.resume(None if resume == "auto" else Path(resume)):
        console.print(f"{name}: going on from step {trainer.step} of {trainer.steps}", highlight=False)
    if output is not None and world.first:
        output.mkdir(exist_ok=True)
    report: Any = contextlib.nullcontext()
    if world.first:
        report = Report(name, trainer.recipe.epochs, console, output, trainer.step)
        trainer.on_log, trainer.on_epoch = report.on_log, report.on_epoch
    with report:
        trainer.fit()


def _title(recipe: Recipe, data: Data, unreadable: int = 0) -> str:
    left_out = f"; {unreadable} training image{'s' * (unreadable > 1)} could not be read" if unreadable else ""
    size = "x".join(map(str, data.input_size))
    idling = f"keep ratio {recipe.keep_ratio:g}" if recipe.schedule is None else f"keep ratios {recipe.schedule}"
    return f"{recipe.model} on {recipe.data}, {size}, {recipe.dtype}, {idling}{left_out}"
