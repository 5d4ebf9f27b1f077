"""Everything worth knowing of this package on one NVIDIA GPU, in one command: ``python bench/gpu_report.py``.

Five steps: correctness (``pytest -m gpu``), ops, block, model, training. Each gets a share of ``--seconds``; one that
fails is recorded with its traceback and the others run. The result is JSON in bench/results and tables on the screen.
Every ratio is of two medians taken in alternation in one run, on inputs that rotate so that the L2 cache does not help.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels import roofline
from idlevit_kernels.info import device_name, environment
from idlevit_kernels.roofline import Shape
from idlevit_kernels.schedule import num_kept
from idlevit_kernels.timing import Timing, alternate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Rows = list[dict[str, Any]]
Calls = dict[str, Callable[[], Any]]

_ROTATED_BYTES = 256 << 20  # more than any L2 cache holds


def rotation(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """As many inputs as the L2 cache cannot hold, but no more than 64."""
    count = math.ceil(_ROTATED_BYTES / (math.prod(shape) * dtype.itemsize)) if device.type == "cuda" else 2
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(min(max(count, 2), 64))]


def each(function: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


def captured(function: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """One CUDA graph of the function on every input in turn; on a CPU, the plain calls.

    A replay is len(inputs) calls on other memory each, so the time of one call is that of the replay over their number.
    """

    def run() -> None:
        for x in inputs:
            function(x)

    if not inputs[0].is_cuda:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autotuning and library handles must be made before capture
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timing_fields(name: str, timing: Timing, calls: int = 1) -> dict[str, float]:
    """Microseconds a call."""
    return {f"{name}_{field}_us": 1e6 * getattr(timing, field) / calls for field in ("median", "p20", "p80")}


def within(seconds: float, cases: Sequence[Any]) -> Iterator[Any]:
    """The cases, as long as there is time; raises TimeoutError where some are left. One case is never cut short."""
    begin = time.perf_counter()
    for i, case in enumerate(cases):
        if i and time.perf_counter() - begin > seconds:
            raise TimeoutError(f"no time is left for {cases[i:]}")
        yield case


# Of a step's time; the rest is for warm-up, compilation and capture.
_MEASURED = 0.5


# The steps. Each takes its seconds and the device, and appends to rows as it goes: what a failure cuts off is kept.


def correctness(rows: Rows, seconds: float, device: torch.device) -> None:
    """The tests marked gpu, in a process of their own; raises if any fails or none ran."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=seconds
    )
    lines = done.stdout.strip().splitlines()
    rows.append({"command": "pytest tests -m gpu", "exit_code": done.returncode, "summary": lines[-1] if lines else ""})
    if done.returncode:
        raise RuntimeError(f"pytest tests -m gpu exited with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr}")
    if " passed" not in rows[-1]["summary"]:
        raise RuntimeError(f"no GPU test ran: {rows[-1]['summary']}")


DEIT_S_256 = Shape(256, 197, 138, 384, 6)


def _select_peer(x: Tensor, scores: Tensor, num_keep: int, norm: nn.LayerNorm) -> Tensor:
    """select_gather_norm in plain PyTorch, as token-pruning code writes it."""
    image = scores[:, 1:].topk(num_keep, dim=1).indices.sort(dim=1).values + 1
    indices = F.pad(image, (1, 0))
    return norm(x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2])))


@torch.inference_mode()
def ops(rows: Rows, seconds: float, device: torch.device, shape: Shape = DEIT_S_256, compiled: bool = True) -> None:
    """Achieved GB/s of each fused op beside a copy on the device in the same run, and of PyTorch's own selection."""
    B, T, n, C = shape.B, shape.T, shape.n, shape.C
    tokens = rotation((B, T, C), device, shape.dtype)
    u, branch, kept = (torch.randn(size, device=device, dtype=shape.dtype) for size in ((B, C), (B, n, C), (B, n, C)))
    norm = nn.LayerNorm(C, eps=1e-6, device=device, dtype=shape.dtype)
    parameters = (norm.weight, norm.bias, norm.eps)
    scores = ik.token_scores(tokens[0], u, *parameters)
    indices = ik.select_tokens(scores, n - 1)
    peer = "topk + gather + norm"
    calls: dict[str, Callable[[Tensor], Any]] = {
        "copy": lambda x: x.clone(),
        "token_scores": lambda x: ik.token_scores(x, u, *parameters),
        "select_gather_norm": lambda x: ik.select_gather_norm(x, scores, n - 1, 1, *parameters),
        "gather_add_norm": lambda x: ik.gather_add_norm(x, indices, branch, None, 1.0, *parameters),
        "scatter_add": lambda x: ik.scatter_add_tokens(x, indices, kept, branch, None, 1.0),
        peer: lambda x: _select_peer(x, scores, n - 1, norm),
    }
    if compiled:
        fused = torch.compile(_select_peer, fullgraph=True, dynamic=False)
        calls[f"{peer}, compiled"] = lambda x: fused(x, scores, n - 1, norm)
    moved = {step.name: step.bytes for step in roofline.idle_block_steps(shape)} | {"copy": 2 * tokens[0].nbytes}
    graphs = {name: captured(call, tokens) for name, call in calls.items()}
    timings = alternate(graphs, _MEASURED * seconds, device=device)
    # PyTorch's selection is credited with the bytes that the task needs, not with those it moves.
    rates = {
        name: moved.get(name, moved["select_gather_norm"]) * len(tokens) / timing.median / 1e9
        for name, timing in timings.items()
    }
    for name, timing in timings.items():
        row = {"op": name, "B": B, "T": T, "n": n, "C": C, "GB_per_s": rates[name]}
        rows.append(row | {"of_copy": rates[name] / rates["copy"]} | timing_fields("call", timing, len(tokens)))


# T, C, H; the ratios below are those of the stages of a model at 0.7.
BLOCKS = {
    "DeiT-S": (197, 384, 6),
    "DeiT-B": (197, 768, 12),
    "ViT-L 384": (577, 1024, 16),
    "DINOv2-L 518": (1370, 1024, 16),
}


@torch.inference_mode()
def block(
    rows: Rows,
    seconds: float,
    device: torch.device,
    blocks: dict[str, tuple[int, int, int]] = BLOCKS,
    batches: Sequence[int] = (1, 8, 64, 256),
    ratios: Sequence[float] = (0.7, 0.49, 0.343),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """An idle block on [B, T, C] over timm's block on [B, n, C], CUDA graphs on both sides."""
    from timm.models.vision_transformer import Block

    cases = list(itertools.product(blocks.items(), batches, ratios))

    def measure(B: int, T: int, C: int, H: int, num_keep: int) -> tuple[dict[str, Timing], int]:
        dense = Block(C, H, qkv_bias=True).eval().to(device, dtype)
        tokens = rotation((B, T, C), device, dtype)
        kept = [x[:, : 1 + num_keep].contiguous() for x in tokens]
        graphs = {"idle": captured(lambda x: ik.idle_block(x, dense, num_keep), tokens), "dense": captured(dense, kept)}
        return alternate(graphs, _MEASURED * seconds / len(cases), device=device), len(tokens)

    for (name, (T, C, H)), B, ratio in within(seconds, cases):
        timings, calls = measure(B, T, C, H, num_kept(ratio, T - 1))
        row: dict[str, Any] = {"block": name, "B": B, "T": T, "C": C, "keep_ratio": ratio}
        row["overhead"] = timings["idle"].median / timings["dense"].median
        for side, timing in timings.items():
            row |= timing_fields(side, timing, calls)
        rows.append(row)


def _pair(name: str, device: torch.device, keep_ratio: float) -> tuple[nn.Module, nn.Module]:
    import timm

    dense, idle = (timm.create_model(name).to(device) for _ in range(2))
    idle.load_state_dict(dense.state_dict())
    return dense, ik.apply_idle(idle, keep_ratio)


@torch.inference_mode()
def model(
    rows: Rows,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    batches: Sequence[int] = (256, 64, 8, 1, 1024),  # compiling may use up the time: what matters most comes first
    dtype: torch.dtype = torch.bfloat16,
    size: int = 224,
    compiled: bool = True,
) -> None:
    """Images per second: dense timm in eager mode and compiled, and IdleViT in eager mode, as a graph and compiled."""
    dense, idle = (m.eval().to(dtype) for m in _pair(name, device, 0.7))
    for B in within(seconds, batches):
        images = rotation((B, 3, size, size), device, dtype)[:4]
        calls: Calls = {"dense": each(dense, images), "idle": each(idle, images)}
        counts = dict.fromkeys(calls, 1)
        for side, network in (("dense graph", dense), ("idle graph", idle)):
            calls[side], counts[side] = captured(network, images), len(images)
        if compiled:
            torch.compiler.reset()
            for side, network in (("dense compiled", dense), ("idle compiled", idle)):
                calls[side] = each(torch.compile(network, mode="max-autotune", dynamic=False), images)
                counts[side] = 1
        timings = alternate(calls, _MEASURED * seconds / len(batches), device=device)
        baseline = "dense compiled" if compiled else "dense"
        per_image = {side: t.median / counts[side] / B for side, t in timings.items()}
        for side, timing in timings.items():
            row = {"model": name, "variant": side, "B": B, "images_per_s": 1 / per_image[side]}
            row |= {"baseline": baseline, "speedup": per_image[baseline] / per_image[side]}
            rows.append(row | timing_fields("batch", timing, counts[side]))


def training(
    rows: Rows,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    batches: Sequence[int] = (128, 256),
    size: int = 224,
) -> None:
    """Time and peak memory of a step (forward, backward, AdamW) of idle and of dense finetuning, bfloat16 autocast."""
    networks = dict(zip(("dense", "idle"), _pair(name, device, 0.7), strict=True))
    optimizers = {side: torch.optim.AdamW(m.parameters(), lr=1e-5) for side, m in networks.items()}
    for B in within(seconds, batches):
        images = rotation((B, 3, size, size), device, torch.float32)[:4]
        labels = torch.randint(10, (B,), device=device)

        def step(side: str, x: Tensor, labels: Tensor = labels) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(networks[side].train()(x), labels)
            loss.backward()
            optimizers[side].step()
            optimizers[side].zero_grad(set_to_none=True)

        calls: Calls = {side: each(functools.partial(step, side), images) for side in networks}
        peaks: dict[str, int | None] = dict.fromkeys(calls)
        for side, call in calls.items():
            call()  # makes the optimizer's state, which is no part of what a step adds
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                call()
                peaks[side] = torch.cuda.max_memory_allocated(device)
        timings = alternate(calls, _MEASURED * seconds / len(batches), device=device)
        for side, timing in timings.items():
            row = {"model": name, "variant": side, "B": B, "peak_bytes": peaks[side]}
            row["speedup"] = timings["dense"].median / timing.median
            rows.append(row | timing_fields("step", timing))


# Each step's share of the time.
STEPS: dict[str, tuple[float, Callable[..., None]]] = {
    "correctness": (0.35, correctness),
    "ops": (0.1, ops),
    "block": (0.2, block),
    "model": (0.2, model),
    "training": (0.15, training),
}


def run_steps(
    seconds: float, device: torch.device, steps: dict[str, tuple[float, Callable[..., None]]] | None = None
) -> dict[str, Any]:
    """Rows, duration and (None or a traceback) error of each step, in order. A step gets its share of what is left."""
    steps = STEPS if steps is None else steps
    begin, report = time.perf_counter(), dict[str, Any]()
    shares = sum(share for share, _ in steps.values())
    for name, (share, step) in steps.items():
        start, error = time.perf_counter(), None
        rows: Rows = []
        left = max(0.0, seconds - (start - begin))
        try:
            step(rows, left * share / shares, device)
        except Exception:  # whatever goes wrong in one step, the others are worth having
            error = traceback.format_exc()
        shares -= share
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report[name] = {"error": error, "seconds": time.perf_counter() - start, "rows": rows}
    return report


def write(report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """The report as JSON, whole or not at all; the name holds the device and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = report["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"gpu_report_{'_'.join(report['device_name'].split())}_{stamp}.json".replace("/", "_")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def show(report: dict[str, Any], console: Console) -> None:
    for name, step in report["steps"].items():
        state = "failed" if step["error"] else "done"
        console.print(f"\n[bold]{name}[/bold]: {state} in {step['seconds']:.0f} s")
        if step["rows"]:
            columns = [c for c in step["rows"][0] if not c.endswith(("p20_us", "p80_us"))]
            table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
            for row in step["rows"]:
                table.add_row(*(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
            console.print(table)
        if step["error"]:
            console.print(step["error"], style="red", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything, about (default: %(default)g)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_name": device_name(device),
        "environment": environment(),
    }
    steps = run_steps(options.seconds, device)
    report = {**facts, "steps": steps}
    show(report, Console(highlight=False))
    print(f"\nwritten: {write(report)}")
    return int(any(step["error"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
