"""Everything worth knowing of this package on one NVIDIA GPU: ``python bench/gpu_report.py --steps block,model``.

The steps stand in gpu_steps.py. Each part of a step runs in a process of its own, which is stopped when its share of
``--seconds`` is over; no part can harm another. Rows go as they come to ``--output`` ($OUT if that is set), a file of
JSON lines for each step: the first line of a part says what it ran on, the last how it ended. Tables are printed, the
shortest last. ``--smoke`` runs the same code at tiny sizes, without a GPU too: not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from gpu_steps import PROCESSES, SMOKE, STEPS, Plan, Row, Step, TritonCache, stop
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idlevit_kernels.measure.info import backend_reasons, run_facts

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 150
# Of a part's time: its step is told to stop starting new cases before the part itself is stopped.
_TOLD = 0.8


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU at this moment; None without it. Reads, and sets nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False)) if done.returncode == 0 else None


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, written by one call: it is there or not, whatever happens to this process afterwards."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


# A part, in its own process


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)  # this process leads a group: its own children end as well


def run_part(step: Step, seconds: float, device: str, path: Path, part: Mapping[str, Any]) -> None:
    """The body of a part's process: a line for its beginning, its rows, and a line for its end."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin, cache = time.perf_counter(), TritonCache()
    about = run_facts(["python", *sys.argv], torch.device(device), clocks=clocks(), backends=backend_reasons())
    append(path, {"kind": "begin", **part, **about})
    error = None
    try:
        step(lambda row: append(path, {"kind": "row", **part, **row}), _TOLD * seconds, torch.device(device))
    except Exception:
        error = traceback.format_exc()
    end = {"error": error, "seconds": round(time.perf_counter() - begin, 2), "clocks": clocks()}
    append(path, {"kind": "end", **part, **end, "triton_cache": cache.counts()})


# The parts, one after the other


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def supervise(step: Step, seconds: float, device: str, path: Path, part: Mapping[str, Any]) -> None:
    """Runs a part in a process of its own, for so many seconds at most; its file tells in any case how it ended."""
    lines_before, begin = len(read(path)), time.perf_counter()
    process = PROCESSES.Process(target=run_part, args=(step, seconds, device, path, part))
    try:
        process.start()
        process.join(max(0.1, seconds))
        if process.is_alive():
            error: str | None = f"TimeoutError: stopped after {seconds:.0f} s"
        else:
            error = f"its process ended with exit code {process.exitcode}"
    finally:  # also where this process is told to end
        stop(process)
        process.join()
    if not any(line["kind"] == "end" for line in read(path)[lines_before:]):
        append(path, {"kind": "end", **part, "error": error, "seconds": round(time.perf_counter() - begin, 2)})


def run_steps(plans: Mapping[str, Plan], seconds: float, device: str, output: Path) -> Iterable[str]:
    """Runs the steps in order; yields the name of each that is done. A part gets its share of the time that is left."""
    end = time.monotonic() + seconds
    shares = sum(plan.seconds for plan in plans.values())
    for name, plan in plans.items():
        for i, (part, step) in enumerate(plan.parts.items()):
            share = plan.seconds / len(plan.parts)
            limit = (end - time.monotonic()) * share / max(share, shares)
            about = {"step": name, "part": part} if part else {"step": name}
            if i == 0:
                output.mkdir(parents=True, exist_ok=True)
            supervise(step, limit, device, output / f"{name}.jsonl", about)
            shares -= share
        yield name


# Tables


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value).partition("\n")[0])


_SHOWN = 60  # rows of a step; the files have all


def show(name: str, lines: Sequence[Row], console: Console) -> None:
    rows = [line for line in lines if line["kind"] == "row"]
    # Where most rows say that all is well, those that do not are shown.
    well = ("right", "refused", "passed", "skipped")
    shown = [row for row in rows if row.get("status", row.get("outcome")) not in well][:_SHOWN]
    hidden = ("kind", "step", "message", "p20_us", "p80_us")
    columns = [column for column in dict.fromkeys(itertools.chain(*shown)) if not column.endswith(hidden)]
    if columns:
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title=name, title_justify="left")
        for row in shown:
            table.add_row(*(_cell(row.get(column, "")) for column in columns))
        console.print(table)
    for line in lines:
        if line["kind"] == "end" and line["error"]:
            part = f" {line['part']}" if "part" in line else ""
            console.print(f"{name}{part}: {line['error'][-1500:]}", style="red", markup=False, highlight=False)


def _best(rows: Iterable[Row], value: str, worst: Callable[..., Any], **wanted: Any) -> float | None:
    found = [row[value] for row in rows if value in row and all(row.get(k) == v for k, v in wanted.items())]
    return worst(found) if found else None


def bars(lines: Sequence[Row]) -> list[tuple[str, str, float | None, bool]]:
    """What a GPU should reach, of that which was measured: name, bar, found, held."""
    rows = [line for line in lines if line["kind"] == "row"]
    wrong = [row for row in rows if row.get("status") in ("wrong", "error")]
    failed = [row for row in rows if row.get("outcome") == "failed"]
    backends = sorted({row["backend"] for row in rows if row["step"] == "block" and "backend" in row})
    moved = sorted({row["side"] for row in rows if row["step"] == "ops" and row.get("side") in ("triton", "cuda")})
    found: list[tuple[str, str, float | None, bool]] = []

    def bar(name: str, limit: float, value: float | None, at_most: bool) -> None:
        if value is not None:
            held = value <= limit if at_most else value >= limit
            found.append((name, f"{'at most' if at_most else 'at least'} {limit:g}", value, held))

    if any("status" in row for row in rows):
        bar("cases of ops that are wrong or fail", 0, float(len(wrong)), True)
    if any("outcome" in row for row in rows):
        bar("tests that fail", 0, float(len(failed)), True)
    for side in moved:
        least = _best(rows, "of_copy", min, side=side, B=256, mode="graph")
        bar(f"bytes/s of every op over a copy, B 256, {side}", 0.8, least, False)
    for name in backends:
        most = _best(rows, "overhead", max, backend=name, B=256)
        bar(f"idle over dense block on n tokens, B 256, {name}", 1.08, most, True)
    small = {"model": "deit_small_patch16_224", "variant": "idle, graph"}
    bar("DeiT-S over dense, graphs, B 256", 1.35, _best(rows, "speedup", min, B=256, **small), False)
    slowest = [_best(rows, "speedup", min, B=B, **small) for B in (8, 64, 256)]
    bar("DeiT-S over dense, graphs, B 8 and more", 1.0, min((v for v in slowest if v), default=None), False)
    return found


def summary(names: Sequence[str], lines: Sequence[Row], console: Console) -> bool:
    """The short table, last. Returns whether every part ended well."""
    table = Table("bar", "wanted", "found", "held", box=box.SIMPLE_HEAD, pad_edge=False)
    for bar, wanted, value, held in bars(lines):
        table.add_row(bar, wanted, _cell(value), "yes" if held else "[red]no[/red]")
    if table.row_count:
        console.print(table)
    table = Table("step", "rows", "seconds", "Triton hits", "misses", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    good = True
    for name in names:
        own = [line for line in lines if line["step"] == name]
        ends = [line for line in own if line["kind"] == "end"]
        rows = [line for line in own if line["kind"] == "row"]
        failed = [line for line in ends if line["error"]]
        good = good and bool(ends) and not failed
        counted = [line.get("triton_cache") or {} for line in ends] + rows
        cache = (str(sum(c.get(key, 0) for c in counted)) for key in ("hits", "misses"))
        state = "done" if not failed else f"{len(failed)} of {len(ends)} parts failed"
        table.add_row(name, str(len(rows)), f"{sum(line['seconds'] for line in ends):.0f}", *cache, state)
    console.print(table)
    return good


def chosen(plans: Mapping[str, Plan], names: str | None) -> dict[str, Plan]:
    wanted = names.split(",") if names else list(plans)
    unknown = [name for name in wanted if name not in plans]
    if unknown:
        raise SystemExit(f"gpu_report: --steps must be some of {','.join(plans)}, got {','.join(unknown)}")
    return {name: plans[name] for name in wanted}


def output_folder(given: str | None, smoke: bool) -> Path:
    if given or os.environ.get("OUT"):
        return Path(given or os.environ["OUT"])
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    return Path(tempfile.mkdtemp(prefix="gpu_report_")) if smoke else ROOT / "bench" / "results" / f"gpu_{stamp}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", help=f"some of {','.join(STEPS)}; all by default")
    parser.add_argument("--seconds", type=float, help="for everything, at most; by default what the steps are made for")
    parser.add_argument("--output", help="folder of the JSON lines; $OUT, or a new one in bench/results, by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    options = parser.parse_args(arguments)
    plans = chosen(SMOKE if options.smoke else STEPS, options.steps)
    if not (options.smoke or torch.cuda.is_available()):
        print("gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured", file=sys.stderr)
        return 2
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    seconds = options.seconds or sum(plan.seconds for plan in plans.values())
    output = output_folder(options.output, options.smoke)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    console = Console(width=WIDTH, highlight=False)
    lines: list[Row] = []
    for name in run_steps(plans, seconds, device, output):
        own = read(output / f"{name}.jsonl")
        lines += own
        with contextlib.suppress(BrokenPipeError):
            show(name, own, console)
    good = summary(list(plans), lines, console)
    print(f"{'smoke, not a measurement: ' if options.smoke else ''}{output}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
