"""The steps of gpu_report.py: what each measures or checks on a device, row by row.

A step takes ``add``, which keeps a row as soon as it is there, its seconds, and the device. What it had not added when
it fails or is stopped is lost, and no more. Every ratio is of two medians taken in alternation in one run, on inputs
that rotate so that the L2 cache does not help.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.block.latency import random_inputs
from idlevit_kernels.block.timing import Timing, alternate
from idlevit_kernels.measure import roofline
from idlevit_kernels.measure.roofline import Shape
from idlevit_kernels.ops import backends, testing
from idlevit_kernels.schedule import num_kept

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
Row = dict[str, Any]
Add = Callable[[Row], object]
Step = Callable[[Add, float, torch.device], None]
Calls = dict[str, Callable[[], Any]]

# Processes that are the context of no other: they start from a server that never touches CUDA.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "timm", "idlevit_kernels"])


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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # leaves the current stream as it was, even where the capture fails
        run()  # autotuning and library handles must be made before a capture
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.current_stream().wait_stream(stream)
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


class TritonCache:
    """Counts, from its making on, how many kernels this process found compiled and how many it had to compile."""

    def __init__(self) -> None:
        self.hits = self.misses = 0
        with contextlib.suppress(ImportError, AttributeError):  # no Triton, or one whose compiler tells nobody
            import triton

            triton.knobs.compilation.listener = self._note

    def _note(self, *, cache_hit: bool, **_: Any) -> None:
        self.hits += cache_hit
        self.misses += not cache_hit

    def counts(self) -> Row:
        return {"hits": self.hits, "misses": self.misses}


# Processes


def stop(process: subprocess.Popen | multiprocessing.process.BaseProcess) -> None:
    """Ends a process and those that it has started, which share its group."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def run_command(command: Sequence[str], seconds: float, on_line: Callable[[str], None], **variables: str) -> int | None:
    """The exit code of a command, in ROOT, each line of whose output is given to on_line; None if it was stopped."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(BENCH), os.environ.get("PYTHONPATH"))))
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **variables}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0,
    )  # fmt: skip
    assert process.stdout is not None
    # An alarm rather than a thread: reading a line waits for as long as the command is silent.
    previous = signal.signal(signal.SIGALRM, lambda *_: stop(process))
    signal.setitimer(signal.ITIMER_REAL, max(0.01, end - time.monotonic()))
    try:
        for line in process.stdout:
            on_line(line.rstrip("\n"))
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        stop(process)
    return None if code == -signal.SIGKILL and time.monotonic() >= end else code


def _serve(function: Callable[..., list[Row]], connection: Connection) -> None:
    """Runs the jobs that come, until one leaves the device unusable: then this process ends and another takes over."""
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(*job))
        except Exception as error:
            connection.send([{"status": "error", "message": f"{type(error).__name__}: {error}"[:2000]}])
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError:
            return


def isolated(
    function: Callable[..., list[Row]], jobs: Sequence[tuple[Any, ...]], workers: int, seconds: float, longest: float
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Each job with the rows of ``function(*job)``, as they come; what ends or blocks a process costs that job alone.

    Args:
        longest: seconds that one job may take.
    """
    end = time.monotonic() + seconds
    waiting = collections.deque(jobs)
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, tuple[Any, ...], float]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process, connection = idle.pop() if idle else _worker(function)
                job = waiting.popleft()
                try:
                    connection.send(job)
                except OSError:  # it ended after its last job
                    waiting.appendleft(job)
                    continue
                busy[connection] = process, job, time.monotonic()
            for connection in wait(list(busy), timeout=0.2):
                process, job, _ = busy.pop(connection)  # type: ignore[call-overload]
                try:
                    yield job, connection.recv()  # type: ignore[union-attr]
                    idle.append((process, connection))  # type: ignore[arg-type]
                except (EOFError, OSError):
                    process.join()
                    yield job, [{"status": "error", "message": f"its process ended with exit code {process.exitcode}"}]
            now = time.monotonic()
            for connection, (process, job, since) in list(busy.items()):
                if now - since > longest or now > end:
                    del busy[connection]
                    process.kill()
                    yield job, [{"status": "error", "message": f"stopped after {now - since:.0f} s"}]
            if now > end and waiting:
                raise TimeoutError(f"no time is left for {len(waiting)} of {len(jobs)} jobs")
    finally:
        for process, *_ in [*idle, *busy.values()]:
            process.kill()


def _worker(function: Callable[..., list[Row]]) -> tuple[Any, Connection]:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends the pipe
    return process, ours


# Is it right?


def check_case(op: str, backend: str, case: testing.Case, device: str) -> list[Row]:
    """The op on the backend against the float64 reference."""
    cache = TritonCache()
    row: Row = {"op": op, "backend": backend, "dtype": str(case.dtype).removeprefix("torch."), "case": str(case)}
    arguments = testing.make_arguments(op, case, device=device)
    reasons = backends.named(backend).reasons(op, arguments)
    if reasons:
        return [row | {"status": "refused", "message": "; ".join(reasons)}]
    wanted = testing.expected(op, arguments)
    found = testing.run(op, arguments, backend)
    try:
        testing.check(op, found, wanted, case.dtype)
    except AssertionError as error:
        return [row | {"status": "wrong", "message": str(error)} | cache.counts()]
    errors = [testing.error(f, w) for f, w in zip(found, wanted, strict=True)]
    return [row | {"status": "right", "error": max(errors, default=0.0)} | cache.counts()]


def correct(
    add: Add,
    seconds: float,
    device: torch.device,
    use: Sequence[str] = ("triton", "cuda"),
    cases: Sequence[testing.Case] = (*testing.CASES, *testing.LARGE_CASES),
    workers: int = 12,
) -> None:
    """Every op, backend, dtype and case against the float64 reference, in processes of their own."""
    jobs = [(op, name, case, str(device)) for case in cases for name in use for op in testing.OPS]
    found = collections.Counter[str]()
    for (op, name, case, _), rows in isolated(check_case, jobs, workers, seconds, longest=max(10.0, seconds / 2)):
        for row in rows:
            found[row["status"]] += 1
            add({"op": op, "backend": name, "case": str(case)} | row)
    if found["wrong"] or found["error"]:
        raise RuntimeError(f"{found['wrong']} cases are wrong and {found['error']} failed; their rows tell how")
    if not found["right"]:
        raise RuntimeError("no case ran: every backend refused; the rows hold the reasons")


def tests(
    add: Add,
    seconds: float,
    device: torch.device,
    selection: Sequence[str] = ("tests/gpu", "-m", "gpu"),
    workers: int = 12,
) -> None:
    """pytest, a row a test as it ends; raises if one fails or none ran."""
    parallel = ("-n", str(workers)) if workers > 1 and importlib.util.find_spec("xdist") else ()
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu_test_rows", *selection,
        *parallel,
    ]  # fmt: skip
    tail: collections.deque[str] = collections.deque(maxlen=100)
    found = collections.Counter[str]()

    def on_line(line: str) -> None:
        if line.startswith('{"test"'):
            row = json.loads(line)
            found[row["outcome"]] += 1
            add(row)
        else:
            tail.append(line)

    code = run_command(command, seconds, on_line, OMP_NUM_THREADS="2")
    if code is None:
        raise TimeoutError(f"stopped after {seconds:.0f} s; {dict(found)}\n" + "\n".join(tail))
    if code or found["failed"]:
        raise RuntimeError(f"pytest exited with {code}; {dict(found)}\n" + "\n".join(tail))
    if not found["passed"]:
        raise RuntimeError(f"no test passed: {dict(found)}\n" + "\n".join(tail))


def _program(name: str) -> str | None:
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), toolkit)))


def sanitizer(add: Add, seconds: float, device: torch.device, tool: str = "memcheck") -> None:
    """compute-sanitizer over a script that calls each op at small shapes."""
    row: Row = {"command": f"compute-sanitizer --tool {tool} bench/call_ops.py", "exit_code": None}
    program = _program("compute-sanitizer")
    if program is None or device.type != "cuda":
        add(row | {"summary": "unavailable: " + ("there is no GPU" if program else "it is not installed")})
        return
    lines: list[str] = []
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, str(BENCH / "call_ops.py")]
    # Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck knows.
    code = run_command(command, seconds, lines.append, PYTORCH_NO_CUDA_MEMORY_CACHING="1", IDLEVIT_AUTOTUNE="0")
    add(row | {"exit_code": code, "summary": lines[-1] if lines else ""})
    if code != 0:
        state = f"exit code {code}" if code is not None else f"stopped after {seconds:.0f} s"
        raise RuntimeError(f"{tool}: {state}\n" + "\n".join(lines[-60:]))


# How fast?


@torch.inference_mode()
def ceilings(add: Add, seconds: float, device: torch.device, megabytes: int = 2048, size: int = 8192) -> None:
    """What this device reaches: copying, a large product, a launch in a graph and one from the host."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), torch.randn(size, size, device=device, dtype=torch.bfloat16)
    small = [torch.zeros(1, device=device) for _ in range(100)]
    calls = {
        "copy": lambda: target.copy_(source),
        "product": lambda: side @ side,
        "100 kernels in a graph": captured(lambda x: x.add_(1), small),
        "100 kernels from the host": lambda: [x.add_(1) for x in small],
    }
    timings = alternate(calls, seconds / 2, device=device)
    rates = {
        "copy": ("GB_per_s", 2e-9 * source.nbytes),
        "product": ("TFLOP_per_s", 2e-12 * size**3),
    }
    for name, timing in timings.items():
        unit, amount = rates.get(name, (None, 0.0))
        add({"ceiling": name} | timing_fields("call", timing) | ({unit: amount / timing.median} if unit else {}))


DEIT_S_256 = Shape(256, 197, 138, 384, 6)


def select_peer(x: Tensor, scores: Tensor, num_keep: int, norm: nn.LayerNorm) -> Tensor:
    """select_gather_norm in plain PyTorch, as token-pruning code writes it."""
    image = scores[:, 1:].topk(num_keep, dim=1).indices.sort(dim=1).values + 1
    indices = F.pad(image, (1, 0))
    return norm(x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2])))


def usable_backends(device: torch.device) -> list[str]:
    probe = (torch.empty(1, 1, 1, device=device),)
    return [b for b in ("triton", "cuda", "cpu") if not backends.named(b).reasons("gather_tokens", probe)]


@torch.inference_mode()
def ops(
    add: Add,
    seconds: float,
    device: torch.device,
    shape: Shape = DEIT_S_256,
    batches: Sequence[int] = (256, 1, 8),
) -> None:
    """Achieved GB/s of each op, on each backend, beside a copy on the device in the same run.

    In CUDA graphs, and in eager mode, where at small batches it is the launch that costs. PyTorch's own selection is
    credited with the bytes that the task needs, not with those it moves.
    """
    usable = usable_backends(device)

    def measure(seconds: float, op: str, B: int, mode: str) -> list[Row]:
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
            sides["topk, gather, norm"] = lambda x: select_peer(x, scores, n - 1, norm)
        graph = mode == "graph"
        calls = {name: captured(f, tokens) if graph else each(f, tokens) for name, f in sides.items()}
        timings = alternate(calls, seconds, device=device)
        steps = roofline.idle_block_steps(dataclasses.replace(shape, B=B), inplace=op.endswith("_"))
        moved = {step.name: step.bytes for step in steps}[op]
        repeats = len(tokens) if graph else 1
        rates = {
            name: (2 * tokens[0].nbytes if name == "copy" else moved) * repeats / timing.median / 1e9
            for name, timing in timings.items()
        }
        return [
            {"side": name, "GB_per_s": rates[name], "of_copy": rates[name] / rates["copy"]}
            | timing_fields("call", timing, repeats)
            for name, timing in timings.items()
        ]

    names = ("token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_")
    order = itertools.product(batches, ("graph", "eager"), names)
    measure_cases(add, seconds, [{"op": op, "B": B, "mode": mode} for B, mode, op in order], measure)


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
    name: str,
    shape: tuple[int, int, int],
    batches: Sequence[int] = (256, 8, 1, 64),  # what matters most comes first
    stages: Sequence[int] = (1, 3),
    keep_ratio: float = 0.7,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """An idle block on [B, T, C], on each backend, over timm's block on the n kept tokens and on all of them.

    CUDA graphs on all sides.
    """
    from timm.models.vision_transformer import Block

    T, C, H = shape
    usable = usable_backends(device)

    def measure(seconds: float, B: int, stage: int) -> list[Row]:
        num_keep = num_kept(keep_ratio**stage, T - 1)
        dense = Block(C, H, qkv_bias=True).eval().to(device, dtype)
        tokens = random_inputs((B, T, C), torch.empty(0, device=device, dtype=dtype))
        kept = [x[:, : 1 + num_keep].contiguous() for x in tokens]
        graphs = {"dense on n": captured(dense, kept), "dense on T": captured(dense, tokens)}
        for backend in usable:
            call = functools.partial(ik.idle_block, block=dense, num_keep=num_keep, backend=backend)
            graphs[backend] = captured(call, tokens)
        timings = alternate(graphs, seconds, device=device)
        fields = timing_fields("dense_n", timings["dense on n"], len(tokens))
        fields |= timing_fields("dense_T", timings["dense on T"], len(tokens))
        return [
            {"n": 1 + num_keep, "backend": backend}
            | {"overhead": timings[backend].median / timings["dense on n"].median}
            | {"speedup": timings["dense on T"].median / timings[backend].median}
            | timing_fields("idle", timings[backend], len(tokens))
            | fields
            for backend in usable
        ]

    cases = [{"B": B, "stage": stage} for B in batches for stage in stages]
    measure_cases(lambda row: add({"block": name, "keep_ratio": keep_ratio} | row), seconds, cases, measure)


def _pair(name: str, device: torch.device, options: Row | None) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A dense model, IdleViT at keep ratio 0.7 with the same weights, and the size of an image."""
    import timm

    dense, idle = (timm.create_model(name, **(options or {})).to(device) for _ in range(2))
    idle.load_state_dict(dense.state_dict())
    return dense, ik.apply_idle(idle, 0.7), (3, *dense.patch_embed.img_size)


@torch.inference_mode()
def model(
    add: Add,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    options: Row | None = None,
    batches: Sequence[int] = (256, 8, 1, 64),
    compiled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Images per second of dense timm and of IdleViT at keep ratio 0.7, eager and as one graph.

    With ``compiled`` also dense under ``torch.compile`` in its default mode, which may use up the time.
    """
    dense, idle, size = _pair(name, device, options)
    dense, idle = dense.eval().to(dtype), idle.eval().to(dtype)
    graphs = device.type == "cuda"

    def measure(seconds: float, B: int) -> list[Row]:
        images = random_inputs((B, *size), next(dense.parameters()), limit=4)
        calls: Calls = {"dense": each(dense, images), "idle": each(idle, images)}
        if graphs:
            for variant, network in (("dense", dense), ("idle", idle)):
                calls[f"{variant}, graph"] = each(ik.capture(network, images[0]), images)
        if compiled:
            torch.compiler.reset()
            calls["dense, compiled"] = each(torch.compile(dense, dynamic=False), images)
        timings = alternate(calls, seconds, device=device)
        # Each against the dense model that runs the same way, a compiled one against the best that there is.
        baseline = {"idle, graph": "dense, graph", "dense, compiled": "dense, graph" if graphs else "dense"}
        return [
            {"variant": variant, "images_per_s": B / timing.median, "baseline": baseline.get(variant, "dense")}
            | {"speedup": timings[baseline.get(variant, "dense")].median / timing.median}
            | timing_fields("batch", timing)
            for variant, timing in timings.items()
        ]

    measure_cases(lambda row: add({"model": name} | row), seconds, [{"B": B} for B in batches], measure)


@torch.inference_mode()
def peer(
    add: Add,
    seconds: float,
    device: torch.device,
    method: str,
    name: str = "deit_small_patch16_224",
    options: Row | None = None,
    batches: Sequence[int] = (256,),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Another method at the MACs of IdleViT, keep ratio 0.7, beside it and dense; eager first, then as graphs."""
    import peers

    dense, idle, size = _pair(name, device, options)
    dense, idle = dense.eval().to(dtype), idle.eval().to(dtype)
    make, on_meta = getattr(peers, method), copy.deepcopy(dense).to("meta")
    low, high = (0.0, 2 * on_meta.patch_embed.num_patches / len(on_meta.blocks)) if method == "ToMe" else (0.01, 1.0)
    macs = ik.count_macs(idle, size).total
    setting = peers.setting_for_macs(lambda setting: make(on_meta, setting), macs, low, high, size)
    networks = {"dense": dense, "idle": idle, f"{method}, {setting:.3g}": make(dense, setting).eval()}

    def measure(seconds: float, B: int, graph: bool) -> list[Row]:
        images = random_inputs((B, *size), next(dense.parameters()), limit=4)
        calls = {v: each(ik.capture(m, images[0]) if graph else m, images) for v, m in networks.items()}
        timings = alternate(calls, seconds, device=device)
        return [
            {"variant": variant, "images_per_s": B / timing.median, "speedup": timings["dense"].median / timing.median}
            | timing_fields("batch", timing)
            for variant, timing in timings.items()
        ]

    modes = (False, True) if device.type == "cuda" else (False,)
    measure_cases(add, seconds, [{"B": B, "graph": graph} for graph in modes for B in batches], measure)


# Of ncu's basic set.
_METRICS = (
    "Duration", "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "Registers Per Thread",
    "Achieved Occupancy",
)  # fmt: skip


def counter_rows(lines: Sequence[str]) -> list[Row]:
    """A row for each kernel in ncu's CSV, with its metrics."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows: dict[str, Row] = {}
    for entry in csv.DictReader(lines[begin:]):
        if entry.get("Metric Name") in _METRICS:
            row = rows.setdefault(entry["ID"], {"kernel": entry["Kernel Name"].partition("(")[0]})
            row[f"{entry['Metric Name']} {entry['Metric Unit']}".strip()] = entry["Metric Value"]
    return list(rows.values())


def counters(add: Add, seconds: float, device: torch.device, shape: str = "DeiT-S") -> None:
    """ncu's basic set over the kernels of an idle block."""
    program = _program("ncu")
    if program is None or device.type != "cuda":
        add({"shape": shape, "summary": "unavailable: " + ("there is no GPU" if program else "ncu is not installed")})
        return
    T, C, _ = BLOCKS[shape]
    lines: list[str] = []
    kernels = "regex:token_scores|select|gather|scatter|score"
    command = [program, "--set", "basic", "--csv", "--page", "details", "--kernel-name", kernels, sys.executable,
               str(BENCH / "call_ops.py"), "--shape", f"64,{T},{C}"]  # fmt: skip
    code = run_command(command, seconds, lines.append, IDLEVIT_AUTOTUNE="0")
    rows = counter_rows(lines)
    for row in rows:
        add({"shape": shape} | row)
    if code != 0 or not rows:
        raise RuntimeError(f"ncu: exit code {code}\n" + "\n".join(lines[-40:]))


@torch.inference_mode()
def trace(
    add: Add,
    seconds: float,
    device: torch.device,
    shape: tuple[int, int, int] = BLOCKS["DeiT-S"],
    batch: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Of an eager idle block on each backend, and of the dense one: launches, microseconds of the host, kernels."""
    from timm.models.vision_transformer import Block
    from torch.profiler import ProfilerActivity, profile

    T, C, H = shape
    x = torch.randn(batch, T, C, device=device, dtype=dtype)
    dense = Block(C, H, qkv_bias=True).eval().to(device, dtype)
    num_keep, repeats = num_kept(0.7, T - 1), 20
    calls: Calls = {"dense": lambda: dense(x)}
    for backend in usable_backends(device):
        calls[backend] = functools.partial(ik.idle_block, x, dense, num_keep, backend=backend)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for name, call in calls.items():
        for _ in range(3):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        host = (time.perf_counter() - begin) / repeats  # with the queue far from full: what the calls themselves take
        if on_gpu:
            torch.cuda.synchronize()
        with profile(activities=activities) as found:
            call()
            if on_gpu:
                torch.cuda.synchronize()
        kernels = [e for e in found.events() if str(e.device_type).endswith("CUDA")]
        add({"side": name, "B": batch, "host_us": 1e6 * host, "launches": len(kernels) if on_gpu else None})
        for event in kernels:
            add({"side": name, "kernel": event.name[:80], "device_us": event.device_time_total})


def training(
    add: Add,
    seconds: float,
    device: torch.device,
    name: str = "deit_small_patch16_224",
    options: Row | None = None,
    batches: Sequence[int] = (128,),
) -> None:
    """Time and peak memory of a step (forward, backward, AdamW), bfloat16 autocast.

    IdleViT with its token cut loss, compact; the same in the dense masked form that the paper trains; dense finetuning.
    """
    from idlevit_kernels.ops.reference.masked_form import masked_form

    dense, idle, size = _pair(name, device, options)
    dense, idle = dense.train(), idle.train()
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
        images = random_inputs((B, *size), next(dense.parameters()), limit=4)
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step's seconds by default, and its parts, each of which runs in a process of its own."""

    seconds: float
    parts: dict[str, Step]


def _plan(seconds: float, step: Callable[..., None], parts: dict[str, Row] | None = None, **options: Any) -> Plan:
    found = parts or {"": {}}
    return Plan(seconds, {name: functools.partial(step, **(options | own)) for name, own in found.items()})


_DEIT = {"DeiT-S": {"name": "deit_small_patch16_224"}, "DeiT-B": {"name": "deit_base_patch16_224"}}
_COMPILED = {f"{name}, compiled": {**options, "compiled": True} for name, options in _DEIT.items()}

# In the order in which they run.
STEPS: dict[str, Plan] = {
    "ceilings": _plan(10, ceilings),
    "correct": _plan(45, correct),
    "tests": _plan(80, tests),
    "sanitizer": _plan(45, sanitizer, {tool: {"tool": tool} for tool in ("memcheck", "initcheck")}),
    "ops": _plan(40, ops),
    "block": _plan(90, block, {name: {"name": name, "shape": shape} for name, shape in BLOCKS.items()}),
    "model": _plan(60, model, _DEIT | _COMPILED),
    "peers": _plan(30, peer, {m: {"method": m} for m in ("EViT", "ToMe")}),
    "counters": _plan(40, counters, {shape: {"shape": shape} for shape in ("DeiT-S", "DINOv2-L 518")}),
    "trace": _plan(10, trace),
    "training": _plan(60, training),
}

_TINY = Shape(2, 17, 9, 32, 2, torch.float32)
_SMALL_CASES = [case for case in testing.CASES if case.C < 100 and case.dtype in (torch.float32, torch.bfloat16)]
_TINY_MODEL: Row = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3},
}
# A second of work each; the rest is for a busy machine.
SMOKE: dict[str, Plan] = {
    "ceilings": _plan(10, ceilings, megabytes=1, size=64),
    "correct": _plan(30, correct, use=("triton", "cuda", "cpu", "reference"), cases=_SMALL_CASES, workers=2),
    "tests": _plan(30, tests, selection=("tests/test_schedule.py",), workers=1),
    "sanitizer": _plan(10, sanitizer, {tool: {"tool": tool} for tool in ("memcheck", "initcheck")}),
    "ops": _plan(20, ops, shape=_TINY, batches=(2, 1)),
    "block": _plan(
        10, block, {"tiny": {"name": "tiny", "shape": (17, 32, 2)}}, batches=(2,), keep_ratio=0.5, dtype=torch.float32
    ),
    "model": _plan(20, model, {"tiny": _TINY_MODEL}, batches=(1,), dtype=torch.float32),
    "peers": _plan(
        30, peer, {m: {"method": m} for m in ("EViT", "ToMe")}, batches=(1,), dtype=torch.float32, **_TINY_MODEL
    ),
    "counters": _plan(10, counters),
    "trace": _plan(10, trace, shape=(17, 32, 2), batch=2, dtype=torch.float32),
    "training": _plan(20, training, batches=(2,), **_TINY_MODEL),
}
