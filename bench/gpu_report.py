"""Everything worth knowing of this package on one NVIDIA GPU, in one command: ``python bench/gpu_report.py``.

Correctness (``pytest -m gpu``), compute-sanitizer, ops, block, model, training. Each step runs in a process of its own
on a share of ``--seconds``: one that fails, overruns or takes the CUDA context with it is recorded, and the others
run. The result is JSON in bench/results and tables on the screen. Every ratio is of two medians taken in alternation
in one run, on inputs that rotate so that the L2 cache does not help. The tests mostly compile: with pytest-xdist
installed they use several cores. ``--smoke`` runs the same code at tiny sizes, without a GPU too, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels import backends, roofline
from idlevit_kernels.info import backend_reasons, device_name, environment
from idlevit_kernels.latency import random_inputs
from idlevit_kernels.roofline import Shape
from idlevit_kernels.schedule import num_kept
from idlevit_kernels.timing import Timing, alternate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]
Add = Callable[[Row], object]  # takes a row of a step's results as soon as it is there
Calls = dict[str, Callable[[], Any]]


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


# Of a case's time; the rest is for warm-up, compilation and capture.
_MEASURED = 0.5


def measure_cases(add: Add, seconds: float, cases: Sequence[Row], measure: Callable[..., Sequence[Row]]) -> None:
    """Adds the rows of ``measure(seconds=..., **case)``, for as many cases as there is time; none is cut short.

    A case that fails is a row with its error. Raises in the end if any failed or was left out.
    """
    begin, failed = time.perf_counter(), 0
    for i, case in enumerate(cases):
        if i and time.perf_counter() - begin > seconds:
            raise TimeoutError(f"no time is left for {len(cases) - i} of {len(cases)} cases, the first: {case}")
        try:
            rows = measure(seconds=_MEASURED * seconds / len(cases), **case)
        except Exception as error:  # out of memory, say: the smaller cases are still worth having
            rows, failed = [{"error": f"{type(error).__name__}: {error}"}], failed + 1
            traceback.print_exc()
        for row in rows:
            add(case | row)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"{failed} of {len(cases)} cases failed; their rows hold the errors")


# The steps. Each takes ``add``, its seconds and the device; what a failure cuts off is kept up to there.


def run_tests(add: Add, seconds: float, selection: Sequence[str], prefix: Sequence[str] = (), **variables: str) -> None:
    """pytest in a process of its own, under the command ``prefix``; raises if a test fails or none ran."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *selection]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **variables}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=seconds,
        )  # fmt: skip
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, code = stopped.stdout or b"", None
    text = output.decode(errors="replace").strip()
    summary = text.splitlines()[-1] if text else ""
    add({"command": " ".join([*map(os.path.basename, prefix[:1]), *prefix[1:], "pytest", *selection]),
         "exit_code": code, "summary": summary})  # fmt: skip
    if code is None:
        raise TimeoutError(f"stopped after {seconds:.0f} s:\n{text[-4000:]}")
    if code:
        raise RuntimeError(f"pytest exited with {code}:\n{text[-8000:]}")
    if " passed" not in summary:
        raise RuntimeError(f"no test ran: {summary}")


def correctness(
    add: Add, seconds: float, device: torch.device, selection: Sequence[str] = ("tests", "-m", "gpu")
) -> None:
    if importlib.util.find_spec("xdist"):
        selection = [*selection, "-n", str(min(8, os.cpu_count() or 1))]
    run_tests(add, seconds, selection)


_SANITIZED = ("tests/test_cuda.py", "tests/test_triton_gpu.py", "-m", "gpu")


def sanitizer(
    add: Add,
    seconds: float,
    device: torch.device,
    selection: Sequence[str] = (*_SANITIZED, "-k", "(test_against_reference or test_op) and (float32 or bfloat16)"),
) -> None:
    """compute-sanitizer's memcheck and racecheck over the kernels at small sizes."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), toolkit)))
    failures = []
    for tool in ("memcheck", "racecheck"):
        if program is None:
            add(
                {
                    "command": f"compute-sanitizer --tool {tool}",
                    "exit_code": None,
                    "summary": "unavailable: not installed",
                }
            )
            continue
        prefix = (program, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all")
        try:
            # Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck knows.
            run_tests(add, seconds / 2, selection, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except (RuntimeError, TimeoutError) as error:
            failures.append(f"{tool}: {error}")
    if failures:
        raise RuntimeError("\n".join(failures))


DEIT_S_256 = Shape(256, 197, 138, 384, 6)


def _select_peer(x: Tensor, scores: Tensor, num_keep: int, norm: nn.LayerNorm) -> Tensor:
    """select_gather_norm in plain PyTorch, as token-pruning code writes it."""
    image = scores[:, 1:].topk(num_keep, dim=1).indices.sort(dim=1).values + 1
    indices = F.pad(image, (1, 0))
    return norm(x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2])))


@torch.inference_mode()
def ops(
    add: Add,
    seconds: float,
    device: torch.device,
    shape: Shape = DEIT_S_256,
    batches: Sequence[int] = (256, 1),
    compiled: bool = True,
) -> None:
    """Achieved GB/s of each op, on each backend, beside a copy on the device in the same run.

    In CUDA graphs; at a batch of one in eager mode, where it is the launch that costs. PyTorch's own selection, eager
    and compiled, is credited with the bytes that the task needs, not with those it moves.
    """
    probe = (torch.empty(1, 1, 1, device=device),)
    usable = [b for b in ("triton", "cuda", "cpu") if not backends.module(b).reasons("gather_tokens", probe)]

    def measure(seconds: float, op: str, B: int, compiled: bool = False) -> list[Row]:
        T, n, C, dtype = shape.T, shape.n, shape.C, shape.dtype
        tokens = random_inputs((B, T, C), torch.empty(0, device=device, dtype=dtype))
        u, branch, kept = (torch.randn(s, device=device, dtype=dtype) for s in ((B, C), (B, n, C), (B, n, C)))
        norm = nn.LayerNorm(C, eps=1e-6, device=device, dtype=dtype)
        scores = torch.randn(B, T, device=device)
        indices = ik.select_tokens(scores, n - 1)
        arguments: dict[str, tuple[Any, ...]] = {
            "token_scores": (u, norm.weight, norm.bias, norm.eps),
            "select_gather_norm": (scores, n - 1, 1, norm.weight, norm.bias, norm.eps),
            "gather_add_norm": (indices, branch, None, 1.0, norm.weight, norm.bias, norm.eps),
            "scatter_add_tokens": (indices, kept, branch, None, 1.0),
            "scatter_add_tokens_": (indices, kept, branch, None, 1.0),
        }

        def call(backend: str) -> Callable[[Tensor], Any]:
            return lambda x: getattr(ik, op)(x, *arguments[op], backend=backend)

        sides: dict[str, Callable[[Tensor], Any]] = {"copy": torch.clone} | {name: call(name) for name in usable}
        if op == "select_gather_norm":
            peer = torch.compile(_select_peer, dynamic=False) if compiled else _select_peer
            sides[f"topk, gather, norm{', compiled' if compiled else ''}"] = lambda x: peer(x, scores, n - 1, norm)
        graph = B > 1
        calls = {name: captured(f, tokens) if graph else each(f, tokens) for name, f in sides.items()}
        timings = alternate(calls, seconds, device=device)
        steps = roofline.idle_block_steps(dataclasses.replace(shape, B=B), inplace=op.endswith("_"))
        moved = {step.name: step.bytes for step in steps}["scatter_add" if op.startswith("scatter") else op]
        repeats = len(tokens) if graph else 1
        rates = {
            name: (2 * tokens[0].nbytes if name == "copy" else moved) * repeats / timing.median / 1e9
            for name, timing in timings.items()
        }
        return [
            {"side": name, "mode": "graph" if graph else "eager", "GB_per_s": rates[name]}
            | {"of_copy": rates[name] / rates["copy"]}
            | timing_fields("call", timing, repeats)
            for name, timing in timings.items()
        ]

    names = ("token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_")
    cases: list[Row] = [{"op": op, "B": B} for B in batches for op in names]
    if compiled:
        cases.append({"op": "select_gather_norm", "B": batches[0], "compiled": True})
    measure_cases(add, seconds, cases, measure)


# T, C, H
BLOCKS = {
    "DeiT-S": (197, 384, 6),
    "DeiT-B": (197, 768, 12),
    "ViT-L 384": (577, 1024, 16),
    "DINOv2-L 518": (1370, 1024, 16),
}


@torch.inference_mode()
def block(
    add: Add,
    seconds: float,
    device: torch.device,
    blocks: dict[str, tuple[int, int, int]] = BLOCKS,
    batches: Sequence[int] = (256, 1, 64, 8),  # what matters most comes first
    keep_ratios: Sequence[float] = (0.7, 0.9, 0.5, 0.8, 0.6),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """An idle block on [B, T, C] over timm's block on [B, n, C], in the three stages of each keep ratio.

    CUDA graphs on both sides.
    """
    from timm.models.vision_transformer import Block

    def measure(seconds: float, keep_ratio: float, B: int, block: str, stage: int) -> list[Row]:
        T, C, H = blocks[block]
        num_keep = num_kept(keep_ratio**stage, T - 1)
        dense = Block(C, H, qkv_bias=True).eval().to(device, dtype)
        tokens = random_inputs((B, T, C), torch.empty(0, device=device, dtype=dtype))
        kept = [x[:, : 1 + num_keep].contiguous() for x in tokens]
        graphs = {"idle": captured(lambda x: ik.idle_block(x, dense, num_keep), tokens), "dense": captured(dense, kept)}
        timings = alternate(graphs, seconds, device=device)
        row: Row = {"n": 1 + num_keep, "overhead": timings["idle"].median / timings["dense"].median}
        for side, timing in timings.items():
            row |= timing_fields(side, timing, len(tokens))
        return [row]

    order = itertools.product(keep_ratios, batches, blocks, (1, 2, 3))
    cases = [dict(zip(("keep_ratio", "B", "block", "stage"), case, strict=True)) for case in order]
    measure_cases(add, seconds, cases, measure)


def _pair(name: str, device: torch.device, keep_ratio: float) -> tuple[nn.Module, nn.Module]:
    import timm

    dense, idle = (timm.create_model(name).to(device) for _ in range(2))
    idle.load_state_dict(dense.state_dict())
    return dense, ik.apply_idle(idle, keep_ratio)


@torch.inference_mode()
def model(
    add: Add,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    batches: Sequence[int] = (256, 1, 64, 8, 1024),
    compiled: Sequence[int] = (256, 1, 64, 8, 1024),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Images per second at keep ratio 0.7: dense timm, IdleViT and the peers of bench/peers, eager and as one graph.

    Then again for each batch with dense and idle compiled by max-autotune, which may use up the time.
    """
    dense, idle = (m.eval().to(dtype) for m in _pair(name, device, 0.7))
    size = dense.default_cfg["input_size"]
    networks = {"dense": dense, "idle": idle}
    try:
        from idlevit_kernels.benchmark import load_peers

        peers = load_peers().peers_of(dense, 0.7, ik.count_macs(idle).total)
        networks |= {f"{peer}, {setting}": network.eval() for peer, (network, setting) in peers.items()}
    except Exception as error:  # IdleViT over dense is worth having without them
        add({"variant": "peers", "error": f"{type(error).__name__}: {error}"})

    def measure(seconds: float, B: int, compiled: bool) -> list[Row]:
        images = random_inputs((B, *size), next(dense.parameters()), limit=4)
        calls: Calls = {}
        failed: list[Row] = []
        for variant, network in networks.items():
            calls[variant] = each(network, images)
            if device.type == "cuda":
                try:
                    calls[f"{variant}, graph"] = each(ik.capture(network, images[0]), images)
                except RuntimeError as error:  # a peer may wait for the device
                    failed.append({"variant": f"{variant}, graph", "error": str(error)})
        if compiled:
            torch.compiler.reset()
            for variant in ("dense", "idle"):
                network = torch.compile(networks[variant], mode="max-autotune", dynamic=False)
                calls[f"{variant}, compiled"] = each(network, images)
        timings = alternate(calls, seconds, device=device)
        baseline = "dense, compiled" if compiled else "dense"
        return failed + [
            {"variant": variant, "images_per_s": B / timing.median, "baseline": baseline}
            | {"speedup": timings[baseline].median / timing.median}
            | timing_fields("batch", timing)
            for variant, timing in timings.items()
        ]

    cases = [{"B": B, "compiled": False} for B in batches] + [{"B": B, "compiled": True} for B in compiled]
    measure_cases(add, seconds, cases, measure)


def training(
    add: Add,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    batches: Sequence[int] = (128, 256),
) -> None:
    """Time and peak memory of a step (forward, backward, AdamW), bfloat16 autocast.

    IdleViT with its token cut loss, compact; the same in the dense masked form that the paper trains; dense finetuning.
    """
    from idlevit_kernels.reference.masked_form import masked_form

    dense, idle = (m.train() for m in _pair(name, device, 0.7))
    schedule = [block.keep_ratio for block in idle.blocks]  # type: ignore[union-attr]
    wrapped = ik.IdleViTForTraining(idle)

    def compact_loss(x: Tensor, labels: Tensor) -> Tensor:
        out = wrapped(x)
        return F.cross_entropy(out.logits, labels) + 20 * out.token_cut.mean()

    def masked_loss(x: Tensor, labels: Tensor) -> Tensor:
        logits, _, token_cut, _ = masked_form(dense, x, schedule, "cls", "both")
        return F.cross_entropy(logits, labels) + 20 * token_cut.mean()

    losses = {
        "idle": (idle, compact_loss),
        "idle, masked form": (dense, masked_loss),
        "dense": (dense, lambda x, labels: F.cross_entropy(dense(x), labels)),
    }
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (dense, idle)}

    def measure(seconds: float, B: int) -> list[Row]:
        images = random_inputs((B, *dense.default_cfg["input_size"]), next(dense.parameters()), limit=4)
        labels = torch.randint(10, (B,), device=device)

        def step(variant: str, x: Tensor) -> None:
            network, loss = losses[variant]
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(x, labels)
            value.backward()
            optimizers[network].step()
            optimizers[network].zero_grad(set_to_none=True)

        calls: Calls = {variant: each(functools.partial(step, variant), images) for variant in losses}
        peaks: dict[str, int | None] = dict.fromkeys(calls)
        for variant, call in calls.items():
            call()  # makes the optimizer's state, which is no part of what a step adds
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                call()
                peaks[variant] = torch.cuda.max_memory_allocated(device)
        timings = alternate(calls, seconds, device=device)
        return [
            {"variant": variant, "peak_bytes": peaks[variant], "speedup": timings["dense"].median / timing.median}
            | timing_fields("step", timing)
            for variant, timing in timings.items()
        ]

    measure_cases(add, seconds, [{"B": B} for B in batches], measure)


# Each step's share of the time.
STEPS: dict[str, tuple[float, Callable[..., None]]] = {
    "correctness": (0.3, correctness),
    "sanitizer": (0.1, sanitizer),
    "ops": (0.1, ops),
    "block": (0.2, block),
    "model": (0.2, model),
    "training": (0.1, training),
}

_TINY = Shape(2, 17, 9, 32, 2, torch.float32)
SMOKE: dict[str, tuple[float, Callable[..., None]]] = {
    "correctness": (0.2, functools.partial(correctness, selection=("tests/test_schedule.py",))),
    "sanitizer": (0.1, sanitizer),
    "ops": (0.2, functools.partial(ops, shape=_TINY, batches=(2, 1))),
    "block": (
        0.1,
        functools.partial(block, blocks={"tiny": (17, 32, 2)}, batches=(2,), keep_ratios=(0.5,), dtype=torch.float32),
    ),
    "model": (
        0.2,
        functools.partial(model, name="vit_tiny_patch16_224", batches=(1,), compiled=(), dtype=torch.float32),
    ),
    "training": (0.2, functools.partial(training, name="vit_tiny_patch16_224", batches=(2,))),
}

# A step that has not ended after this many times its share is stopped.
_LIMIT = 1.5
_START_SECONDS = 30.0  # for the imports of a step's process


def _run_step(step: Callable[..., None], seconds: float, device: str, results: Connection) -> None:
    """The body of a step's process: sends each row, and last its traceback or None."""
    try:
        step(lambda row: results.send((True, row)), seconds, torch.device(device))
    except Exception:
        results.send((False, traceback.format_exc()))
    else:
        results.send((False, None))


def run_step(step: Callable[..., None], seconds: float, device: str) -> Row:
    """Rows, duration and error (None, or what went wrong) of one step, run in a process of its own."""
    # Children of a server that never touches CUDA, so they can; it has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "idlevit_kernels"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run_step, args=(step, seconds, device, send))
    begin = time.perf_counter()
    limit = _LIMIT * seconds + _START_SECONDS
    process.start()
    send.close()  # so that the end of the process ends the pipe
    rows: list[Row] = []
    error: str | None
    try:
        while receive.poll(max(0.0, begin + limit - time.perf_counter())):
            is_row, value = receive.recv()
            if not is_row:
                error = value
                break
            rows.append(value)
        else:
            error = f"TimeoutError: the step had {seconds:.0f} s and was stopped after {limit:.0f} s"
            process.kill()
    except EOFError:
        process.join()
        error = f"the process of this step ended with exit code {process.exitcode}"
    process.join()
    return {"error": error, "seconds": time.perf_counter() - begin, "rows": rows}


def run_steps(seconds: float, device: str, steps: dict[str, tuple[float, Callable[..., None]]]) -> dict[str, Row]:
    """The steps in order; each gets its share of the time that is left."""
    begin, report = time.perf_counter(), dict[str, Row]()
    shares = sum(share for share, _ in steps.values())
    for name, (share, step) in steps.items():
        left = max(0.0, seconds - (time.perf_counter() - begin))
        report[name] = run_step(step, left * share / shares, device)
        shares -= share
    return report


def write(report: Row, folder: Path = RESULTS) -> Path:
    """The report as JSON, whole or not at all; the name holds the device and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = report["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"gpu_report_{'_'.join(report['device_name'].split())}_{stamp}.json".replace("/", "_")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def show(report: Row, console: Console) -> None:
    for name, step in report["steps"].items():
        state = "failed" if step["error"] else "done"
        console.print(f"\n[bold]{name}[/bold]: {state} in {step['seconds']:.0f} s")
        columns = [c for c in dict.fromkeys(itertools.chain(*step["rows"])) if not c.endswith(("p20_us", "p80_us"))]
        if columns:
            table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
            for row in step["rows"]:
                values = (row.get(column, "") for column in columns)
                table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in values))
            console.print(table)
        if step["error"]:
            console.print(step["error"], style="red", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything, about (default: %(default)g)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, on the CPU where there is no GPU; writes nothing"
    )
    options = parser.parse_args(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        print("gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_name": device_name(device),
        "environment": environment(),
        "backends": backend_reasons(),
        "steps": run_steps(options.seconds, str(device), SMOKE if options.smoke else STEPS),
    }
    show(report, Console(highlight=False))
    print("\n--smoke: not a measurement, nothing is written" if options.smoke else f"\nwritten: {write(report)}")
    return int(any(step["error"] for step in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
