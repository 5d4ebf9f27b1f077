"""The command line: ``idlevit`` or ``python -m idlevit_kernels``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .train.recipe import Recipe

if TYPE_CHECKING:
    from .benchmark import ModelRow, Result

app = typer.Typer(
    help="Vision Transformers whose tokens idle instead of being dropped (IdleViT), made fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


MODEL = typer.Option(help="Name of a timm model, or of this package's LV-ViT.")
KEEP_RATIO = typer.Option(help="Keep ratio of the first idle stage; 0.7 if no schedule is given.")
SCHEDULE = typer.Option(metavar="FILE", help="JSON with a keep ratio for each layer, as `idlevit tune` writes it.")
WEIGHTS = typer.Option(metavar="FILE", help="A released checkpoint or a state dict; by default random weights.")
PRETRAINED = typer.Option("--pretrained", help="timm's weights, which it downloads.")
_DataDir = Annotated[Path | None, typer.Option(help="Where a data set that timm knows by name lies.")]
_Download = Annotated[bool, typer.Option("--download", help="Download that data set if it is not there.")]
_ValSplit = Annotated[str, typer.Option(help="Its split that accuracy is measured on.")]
_DRAWN = 4  # images of a run, where none are named


def main() -> None:
    app(prog_name="idlevit")


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Turns the error that an argument caused into one line and exit code 2."""
    from .errors import BackendError

    try:
        yield
    except (BackendError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"idlevit: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Shows versions, devices, the backends (usable, or every reason why not), the build and the settings."""
    from .info import collect

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        Console(highlight=False).print(_info_text(facts))


def _info_text(facts: dict[str, Any]) -> Group:
    env, isa = facts["environment"], facts["cpu_instruction_set"]
    cuda = env["cuda"]
    gpus = [f"{d['name']}, compute capability {d['capability']}, {d['memory_gib']} GiB" for d in cuda["devices"]]
    machine = {
        "idlevit_kernels": env["version"] + (f" (commit {env['commit']})" if env["commit"] else ""),
        "platform": env["platform"],
        **{name: _library_text(library) for name, library in facts["libraries"].items()},
        "CUDA": f"PyTorch is built for {cuda['torch_built_for'] or 'no CUDA'}; driver {cuda['driver'] or 'not found'}",
        "GPU": "\n".join(gpus) or "PyTorch finds none",
        "CPU": f"{env['cpu']}, {env['threads']} threads",
        "CPU kernels": f"{isa['in_use'] or 'not available'} in use; of {', '.join(isa['available']) or 'none'}",
        "CPU torch": isa["torch"],
    }
    backends = {
        name: Text("usable", "green")
        if backend["usable"]
        else Text.assemble(("not usable", "yellow"), *(f"\n- {reason}" for reason in backend["reasons"]))
        for name, backend in facts["backends"].items()
    }
    fast_paths = {
        gate["name"]: Text.assemble(("on", "green") if gate["available"] else ("off", "yellow"), f"\n{gate['detail']}")
        for gate in facts["fast_paths"]
    }
    build = {name: json.dumps(value) for name, value in facts["build"].items()}
    variables = {
        name: Text.assemble(
            "not set" if v["value"] is None else repr(v["value"]),
            (f"\n{v['error']}" if v["error"] else "", "red"),
            (f"\n{v['meaning']}", "dim"),
        )
        for name, v in facts["variables"].items()
    }
    return Group(
        _section("Installed", machine),
        _section("Backends, in the order that 'auto' tries them", backends),
        _section("Fast paths, as far as the versions of other libraries decide", fast_paths),
        _section("Build of the native extension", build or {"": "nothing recorded"}),
        _section("Environment variables", variables),
    )


def _library_text(library: dict[str, Any]) -> Text:
    floor = library["floor"]
    if library["installed"] is None:
        return Text(f"not installed ({floor} or newer)")
    if library["too_old"]:
        return Text(f"{library['installed']}, older than {floor}, the oldest version that is tested", "red")
    return Text(f"{library['installed']} ({floor} or newer)")


def _section(title: str, lines: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=18)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(f"  {name}", value if isinstance(value, Text) else Text(str(value)))
    table.add_row()
    return table


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Name of a timm model of a supported family.")] = "deit_small_patch16_224",
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="Repeat it for several; 0.9, 0.8, ... 0.5 if no schedule is given.")
    ] = None,
    schedule: Annotated[Path | None, SCHEDULE] = None,
    batch: Annotated[list[int], typer.Option(help="Images in a batch; repeat it for several.")] = [1, 8, 32],  # noqa: B006
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:INDEX; by default the best there is.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure torch.compile of dense and IdleViT too; compiling takes minutes.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure EViT, ToMe, DynamicViT, Evo-ViT and the released order too.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time to measure for, if three rounds of all fit into it.")] = 92.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here too.")
    ] = None,
) -> None:
    """Times dense timm and IdleViT in alternation, with random weights: images per second, and what limits them."""
    from .benchmark import ModelBenchmark, set_threads
    from .errors import value_error
    from .info import device_name, environment
    from .schedule import read_schedule
    from .tables import console_for

    with contextlib.ExitStack() as stack:
        with _bad_input():
            if not seconds > 0:
                raise value_error("bench", "seconds", "more than 0", seconds)
            layers = None if schedule is None else read_schedule("bench", schedule)
            ratios = keep_ratio or ([0.9, 0.8, 0.7, 0.6, 0.5] if schedule is None else [])
            set_threads("bench", threads)
            temporary = json_file and stack.enter_context(_temporary_beside(json_file, "bench", "json"))
            benchmark = ModelBenchmark(
                model, ratios, batch, image_size, dtype, device, compiled, peers, schedule=layers
            )
            facts = {
                "command": shlex.join(["idlevit", *sys.argv[1:]]),
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "model": model,
                "input_size": benchmark.input_size,
                "schedule": layers,
                "dtype": dtype,
                "device": str(benchmark.device),
                "device_name": device_name(benchmark.device),
                "backend": benchmark.backend(),
                "environment": environment(),
            }
        with _progress() as on_progress:
            result = benchmark.run(seconds, on_progress)
        table = _bench_table(result)
        console_for(table).print(_bench_text(facts, result, table))
        if json_file and temporary:
            temporary.write_text(json.dumps({**facts, **dataclasses.asdict(result)}, indent=2) + "\n")
            os.replace(temporary, json_file)
    if not result.complete:
        raise typer.Exit(130)


@contextlib.contextmanager
def _temporary_beside(path: Path, command: str, option: str) -> Iterator[Path]:
    """An empty file to write and then move to ``path``; made now, so that a bad path shows before the work."""
    if path.is_dir():
        raise IsADirectoryError(f"{command}: --{option} must be a file, got the directory {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(
            f"{command}: --{option} must be a file that can be written, got {path}: {error.strerror}"
        ) from None
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    columns = TextColumn("{task.description:<17}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("warming up", total=1.0)
        yield lambda label, done: progress.update(task, description=label, completed=done)


def _bench_text(facts: dict[str, Any], result: Result, table: Table) -> Group:
    env = facts["environment"]
    size = "x".join(map(str, facts["input_size"]))
    header = Text(
        f"{facts['model']}, {size}, {facts['dtype']}, {facts['backend']} backend, {facts['device_name']}, "
        f"{env['threads']} CPU threads\nidlevit_kernels {env['version']}, torch {env['torch']}, timm {env['timm']}"
    )
    if not result.complete:
        header.append("\nPARTIAL: interrupted before everything was measured", "bold red")
    legend = Text(
        "images/s: median of alternated calls, 20th to 80th percentile. Speed-up: over dense timm. MAC bound: MACs of"
        " dense over those of the method.",
        "dim",
    )
    legend.append(" Reached: speed-up, over dense of the same mode, over MAC bound.")
    if result.blocks:
        legend.append(
            " Block overhead: the idle block on all tokens over timm's dense block on only the kept ones, in each stage"
            " of idle layers."
        )
    if settings := {f"at {row.keep_ratio:g} {row.method}: {row.setting}" for row in result.models if row.setting}:
        legend.append(f"\nPeers: {'; '.join(sorted(settings))}.")
    return Group(header, "", table, "", legend)


def _bench_table(result: Result) -> Table:
    compiled = any(row.compiled for row in result.models)
    peers = any(row.setting for row in result.models)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("batch", justify="right")
    table.add_column("keep\nratio")
    if peers:
        table.add_column("method", no_wrap=True)
    if compiled:
        table.add_column("mode")
    for title in ("GMACs", "images/s", "p20-p80", "speed-\nup", *(("over\ncompiled",) if compiled else ())):
        table.add_column(title, justify="right")
    table.add_column("MAC\nbound", justify="right")
    table.add_column("reached", justify="right")
    if result.blocks:
        table.add_column("block overhead\nby stage", justify="right")
    overheads: dict[tuple[int, float | None], list[str]] = {}
    for block in result.blocks:
        overheads.setdefault((block.batch, block.keep_ratio), []).append(f"{block.overhead:.2f}")
    previous = None
    for row in result.models:
        if previous and row.batch != previous.batch:
            table.add_section()
        cells = [
            str(row.batch) if not previous or row.batch != previous.batch else "",
            *_bench_cells(row, compiled, peers),
        ]
        dense = row.method == "dense"
        cells.append("" if dense else f"{row.share_of_bound:.0%}")
        if result.blocks:
            idle = row.method == "IdleViT" and not row.compiled
            cells.append(" ".join(overheads.get((row.batch, row.keep_ratio), [])) if idle else "")
        table.add_row(*cells)
        previous = row
    return table


def _bench_cells(row: ModelRow, compiled: bool, peers: bool) -> list[str]:
    digits = 1 if row.images_per_second < 1000 else 0
    dense = row.method == "dense"
    ratio = "schedule" if row.keep_ratio is None else f"{row.keep_ratio:g}"
    over_compiled = "" if row.speedup_compiled is None else f"{row.speedup_compiled:.2f}x"
    return [
        ("" if peers else "dense") if dense else ratio,
        *([row.method] if peers else []),
        *(["compiled" if row.compiled else "eager"] if compiled else []),
        f"{row.macs / 1e9:.3f}",
        f"{row.images_per_second:.{digits}f}",
        f"{row.p20:.{digits}f}-{row.p80:.{digits}f}",
        f"{row.speedup:.2f}x",
        *([over_compiled] if compiled else []),
        "" if dense else f"{row.mac_bound:.2f}x",
    ]


@app.command()
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
    data_dir: _DataDir = None,
    download: _Download = False,
    val_split: _ValSplit = "validation",
) -> None:
    """Draws which tokens each idle layer keeps, how often each is chosen, which come back, and their scores."""
    from .errors import value_error
    from .models import apply_idle
    from .schedule import read_schedule
    from .visualize import visualize as draw

    images: list[Any] = list(image or [])
    with _bad_input(), _failed_run():
        if run is None:
            if not images:
                raise value_error("visualize", "IMAGE", "a file, or several (or pass --run)", None)
            _, idle, _ = _dense_and_idle("visualize", model, keep_ratio, schedule, image_size, weights, pretrained)
        else:
            from .train.task import Place, load_run, open_run_data, some_images

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


@app.command()
def tune(
    target_ms: Annotated[float | None, typer.Option(help="Milliseconds that a batch may take.")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Over the dense timm model in eager mode.")] = None,
    target_macs: Annotated[float | None, typer.Option(help="Billions of multiply-accumulates of an image.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the schedule here, as JSON.")
    ] = None,
    model: Annotated[str, MODEL] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images in a batch: a schedule is for one size.")] = 8,
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:INDEX; by default the best there is.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to measure for, about.")] = 60.0,
) -> None:
    """Finds the schedule with the most kept tokens that meets a target on this device, and measures it."""
    import torch

    from .benchmark import create_model, find_device, find_dtype, set_threads
    from .errors import value_error
    from .info import device_name, environment
    from .tune import Target, tune_schedule

    given = {"ms": target_ms, "speedup": target_speedup, "macs": target_macs}
    targets = [Target(kind, value) for kind, value in given.items() if value is not None]
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        with _bad_input():
            if len(targets) != 1:
                expected = "exactly one of --target-ms, --target-speedup and --target-macs"
                raise value_error("tune", "target", expected, [f"--target-{target.kind}" for target in targets])
            set_threads("tune", threads)
            temporary = output and stack.enter_context(_temporary_beside(output, "tune", "output"))
            torch_device, torch_dtype = find_device("tune", device), find_dtype("tune", dtype)
            dense, size = create_model("tune", model, image_size)
            dense.eval().requires_grad_(False).to(torch_device, torch_dtype)
            with _progress() as on_progress:
                target = targets[0]
                scale = 1e9 if target.kind == "macs" else 1.0
                goal = Target(target.kind, target.value * scale)
                tuned = tune_schedule(dense, goal, batch, size, seconds=seconds, on_progress=on_progress)
        facts = {
            "command": shlex.join(["idlevit", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": model,
            "input_size": size,
            "batch": batch,
            "dtype": dtype,
            "device": str(torch_device),
            "device_name": device_name(torch_device),
            "environment": environment(),
        }
        units = {"ms": "ms a batch", "speedup": "times as fast as dense", "macs": "GMACs"}[target.kind]
        what = "multiply-accumulates" if target.kind == "macs" else "time"
        console.print(
            f"{model}, batch {batch}, {dtype}, {device_name(torch_device)}, {torch.get_num_threads()} CPU threads\n"
            f"target {target.value:g} {units}; reached {tuned.reached / scale:.4g}, measured afresh on the whole model"
            f" ({tuned.deviation:+.1%} of the {what} that the target allows)"
        )
        console.print(f"kept of {tuned.num_image_tokens} tokens, by layer: {' '.join(map(str, tuned.num_keep))}")
        console.print(
            f"dense {tuned.dense.median * 1e3:.1f} ms, idle {tuned.idle.median * 1e3:.1f} ms"
            f" ({tuned.idle.p20 * 1e3:.1f}-{tuned.idle.p80 * 1e3:.1f}), speed-up"
            f" {tuned.dense.median / tuned.idle.median:.2f}x; {tuned.macs / 1e9:.3f} GMACs"
        )
        if output and temporary:
            temporary.write_text(json.dumps({**facts, **dataclasses.asdict(tuned)}, indent=2) + "\n")
            os.replace(temporary, output)
            console.print(f"written: {output}")


def _dense_and_idle(
    op: str,
    name: str,
    keep_ratio: float | None,
    schedule: Path | None,
    image_size: int | None,
    weights: Path | None,
    pretrained: bool,
) -> tuple[Any, Any, tuple[int, int, int]]:
    """The dense model, the idle one around the same weights, and the size of their input."""
    from .benchmark import create_model, sharing_weights
    from .errors import value_error
    from .models import apply_idle, load_released
    from .schedule import read_schedule

    if weights is not None and pretrained:
        raise value_error(op, "weights", "left out where --pretrained is given", str(weights))
    dense, input_size = create_model(op, name, image_size, pretrained)
    dense.eval().requires_grad_(False)
    if weights is not None:
        load_released(dense, weights)
    ratios = None if schedule is None else read_schedule(op, schedule)
    return dense, apply_idle(sharing_weights(dense), keep_ratio, ratios), input_size


@app.command()
def export(
    output: Annotated[Path, typer.Argument(metavar="FILE", help=".onnx, or .pt2 for the other formats.")],
    format: Annotated[str, typer.Option(help="onnx, torch-export or aoti.")] = "onnx",
    model: Annotated[str, MODEL] = "deit_small_patch16_224",
    keep_ratio: Annotated[float | None, KEEP_RATIO] = None,
    schedule: Annotated[Path | None, SCHEDULE] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width; by default the model's own.")] = None,
    weights: Annotated[Path | None, WEIGHTS] = None,
    pretrained: Annotated[bool, PRETRAINED] = False,
    batch: Annotated[int, typer.Option(help="Images in a batch, for the timing; the file takes any number.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time to measure for, beside the dense model; 0: not at all.")] = 20.0,
) -> None:
    """Writes an idle model for onnxruntime or PyTorch, checks its logits and times it beside the dense one there."""
    import tempfile

    import torch

    from .complexity import count_macs
    from .errors import value_error
    from .export import SUFFIXES, export_model, largest_difference, load_exported
    from .tables import console_for
    from .timing import alternate

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    console = Console(highlight=False)
    with _bad_input():
        if batch < 1:
            raise value_error("export", "batch", "at least 1", batch)
        if seconds < 0:
            raise value_error("export", "seconds", "at least 0", seconds)
        dense, idle, size = _dense_and_idle("export", model, keep_ratio, schedule, image_size, weights, pretrained)
        export_model(idle, output, format, size)
    exported = load_exported(output, format)
    difference = largest_difference(idle, exported, size)
    if not difference <= 1e-4:
        print(f"idlevit: export: the logits of {output} differ from PyTorch's by {difference:.1e}", file=sys.stderr)
        raise typer.Exit(1)
    console.print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB; logits as in PyTorch, to {difference:.1e}")
    if not seconds:
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        beside = export_model(dense, Path(folder, "dense" + SUFFIXES[format]), format, size)
        images = torch.randn(batch, *size)
        calls = {"dense": load_exported(beside, format), "idle": exported}
        timings = alternate({name: functools.partial(call, images) for name, call in calls.items()}, seconds)
    bound = count_macs(dense, size).total / count_macs(idle, size).total
    speedup = timings["dense"].median / timings["idle"].median
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in (f"batch {batch}", "images/s", "p20-p80", "speed-up", "MAC bound", "reached"):
        table.add_column(title, justify="right")
    for name, t in timings.items():
        extra = [f"{speedup:.2f}x", f"{bound:.2f}x", f"{speedup / bound:.0%}"] if name == "idle" else []
        table.add_row(name, f"{batch / t.median:.1f}", f"{batch / t.p80:.1f}-{batch / t.p20:.1f}", *extra)
    console_for(table).print(Group(table, ""))


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
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


_Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the best there is.")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes.")]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each process that trains.")]
_OnBadImage = Annotated[str, typer.Option(help="At an image that cannot be read: stop, or skip it and count it.")]


@app.command()
@_recipe_options
def train(
    *,
    given: dict[str, Any],
    output: Annotated[Path | None, typer.Option(help="Directory for checkpoints and logs.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto: go on from what --output holds; or a checkpoint.")] = None,
    data_dir: _DataDir = None,
    download: _Download = False,
    val_split: _ValSplit = "validation",
    device: _Device = None,
    threads: _Threads = None,
    workers: _Workers = 0,
    on_bad_image: _OnBadImage = "stop",
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; there is one after each epoch in any case.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
) -> None:
    """Finetunes an IdleViT, by default on handwritten digits: first dense, then idle. Runs under torchrun, too.

    The recipe's defaults, in brackets with their source, are the paper's for ImageNet; digits have their own where none
    is given. A run can be ended at any time and goes on with --resume auto.
    """
    from .train.engine import Options
    from .train.task import Place, train

    with _bad_input(), _failed_run():
        skip = _skips("train", on_bad_image)
        options = Options(output, workers, checkpoint_steps, skip_unreadable=skip, compile=compiled)
        train(given, options, Place(data_dir, download, val_split, device, threads), resume)


@app.command(name="eval")
@_recipe_options
def evaluate(
    source: Annotated[
        Path | None, typer.Argument(help="Checkpoint, or directory of a run; else --model, --weights and --data.")
    ] = None,
    *,
    given: dict[str, Any],
    ratios: Annotated[
        list[float] | None, typer.Option("--ratio", help="Keep ratio; repeat it for several. [that of the training]")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")] = False,
    data_dir: _DataDir = None,
    download: _Download = False,
    val_split: _ValSplit = "validation",
    device: _Device = None,
    threads: _Threads = None,
    workers: _Workers = 0,
    on_bad_image: _OnBadImage = "stop",
) -> None:
    """Accuracy and images per second of a model, dense and idle side by side. Runs under torchrun, too."""
    from .train.engine import Options
    from .train.task import Place, evaluate_run

    with _bad_input(), _failed_run():
        options = Options(workers=workers, skip_unreadable=_skips("eval", on_bad_image))
        evaluate_run(source, given, ratios or [], ema, options, Place(data_dir, download, val_split, device, threads))


def _skips(op: str, on_bad_image: str) -> bool:
    from .errors import value_error

    if on_bad_image not in ("stop", "skip"):
        raise value_error(op, "on_bad_image", "stop or skip", on_bad_image)
    return on_bad_image == "skip"


@contextlib.contextmanager
def _failed_run() -> Iterator[None]:
    """A run that cannot go on says why: exit code 1, or that of the signal which ended it."""
    from .train.checkpoint import CheckpointError
    from .train.data import UnreadableImage
    from .train.engine import NonFiniteLoss, Stopped

    try:
        yield
    except (CheckpointError, NonFiniteLoss, Stopped, UnreadableImage) as error:
        print(f"idlevit: {error}", file=sys.stderr)
        raise typer.Exit(error.code if isinstance(error, Stopped) else 1) from None
