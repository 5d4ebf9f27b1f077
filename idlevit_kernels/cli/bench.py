"""``idlevit bench``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import value_error
from ..measure.benchmark import ModelBenchmark, ModelRow, PeersOf, Result
from ..measure.info import run_facts
from ..measure.machine import set_threads
from ..measure.tables import console_for
from ..schedule import read_schedule
from .options import SCHEDULE
from .shared import bad_input, progress, temporary_beside


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
    with contextlib.ExitStack() as stack:
        with bad_input():
            if not seconds > 0:
                raise value_error("bench", "seconds", "more than 0", seconds)
            layers = None if schedule is None else read_schedule("bench", schedule)
            ratios = keep_ratio or ([0.9, 0.8, 0.7, 0.6, 0.5] if schedule is None else [])
            set_threads("bench", threads)
            temporary = json_file and stack.enter_context(temporary_beside(json_file, "bench", "json"))
            others = load_peers() if peers else None
            benchmark = ModelBenchmark(
                model, ratios, batch, image_size, dtype, device, compiled, others, schedule=layers
            )
            facts = run_facts(
                ["idlevit", *sys.argv[1:]],
                benchmark.device,
                model=model,
                input_size=benchmark.input_size,
                schedule=layers,
                dtype=dtype,
                backend=benchmark.backend(),
            )
        with progress() as on_progress:
            result = benchmark.run(seconds, on_progress)
        table = _bench_table(result)
        console_for(table).print(_bench_text(facts, result, table))
        if json_file and temporary:
            temporary.write_text(json.dumps({**facts, **dataclasses.asdict(result)}, indent=2) + "\n")
            os.replace(temporary, json_file)
    if not result.complete:
        raise typer.Exit(130)


def load_peers() -> PeersOf:
    """``peers_of`` of bench/peers/ in the checkout that this package runs from; it is not installed with it."""
    folder = Path(__file__).resolve().parents[2] / "bench"
    if not (folder / "peers" / "__init__.py").exists():
        raise FileNotFoundError(
            f"bench: --peers needs {folder / 'peers'}, which is in a checkout of the repository: install from one with"
            " `pip install -e .`, or leave --peers out"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from peers import peers_of

    return peers_of


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
