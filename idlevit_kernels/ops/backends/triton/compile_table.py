"""Compiles every kernel for every supported GPU architecture, without a GPU, and shows what each one uses.

``python -m idlevit_kernels.ops.backends.triton.compile_table`` prints a row for each kernel, type, model shape and
architecture: registers a thread, bytes of stack and local memory (a spill shows there), bytes of shared memory, or the
reason why the backend refuses the op for that type. The launches are recorded from the functions that the backend
calls, run on tensors without data, so the table shows the very specialisations that a model gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from ....versions import triton_compiler
from ...dtypes import accumulate_dtype
from . import gather, norm_backward, scatter, score, select, type_reasons
from .token_cut_loss import backward_configs, forward_configs, token_cut_loss, token_cut_loss_backward

ARCHITECTURES = (80, 90, 100, 120)
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int8: "i8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    T: int
    C: int
    B: int = 64
    keep: float = 0.7


SHAPES = (
    Shape("DeiT-S", 197, 384),
    Shape("DeiT-B", 197, 768),
    Shape("ViT-L 384", 577, 1024),
    Shape("DINOv2-L 518", 1370, 1024),
)


@dataclasses.dataclass(frozen=True)
class Types:
    """Of the tokens, and how products of float32 matrices are computed."""

    name: str
    dtype: torch.dtype
    precision: str = "ieee"


TYPES = (
    Types("bfloat16", torch.bfloat16),
    Types("float16", torch.float16),
    Types("float32", torch.float32),
    Types("float32 tf32", torch.float32, "tf32"),
    Types("float64", torch.float64),
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: all that its machine code depends on, besides the architecture."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # pointers and integers that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages, enable_fp_fusion

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.lstrip("_")

    def configured(self, config: dict[str, int]) -> Launch:
        """The launch with other tile sizes and warps."""
        constants = {k: v for k, v in config.items() if k in dict(self.constants)}
        options = dict(self.options) | {k: v for k, v in config.items() if k not in constants}
        return dataclasses.replace(
            self, constants=tuple((dict(self.constants) | constants).items()), options=tuple(sorted(options.items()))
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What a launch uses on an architecture; None, and every reason, where the backend refuses it."""

    model: str
    types: str
    launch: Launch
    architecture: int
    usage: Usage | None
    reasons: tuple[str, ...] = ()


def _specialise(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Launch:
    """The signature that Triton's launcher would derive from these arguments."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in meta.items() if k in names}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, divisible = {}, {}, []
    for name, value in values.items():
        if name in constexprs or value is None or (type(value) is int and value == 1 and name not in general):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (value % 16 == 0 and name not in general):
            divisible.append(name)
    options = {k: v for k, v in meta.items() if k not in names}
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
    )


def record(call: Callable[[], Any]) -> list[Launch]:
    """The kernel launches that the call would make, none of which runs."""
    launches = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        launches.append(_specialise(kernel, args, meta))

    kernels = triton_compiler().jit_function
    run = kernels.run
    kernels.run = note
    try:
        call()
    finally:
        kernels.run = run
    return launches


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Of float32 products, as PyTorch's setting has it: "ieee" or "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(shape: Shape, types: Types) -> list[Launch]:
    """Every kernel as a model of this shape and type, with one prefix token and LayerScale, launches it."""
    B, T, C = shape.B, shape.T, shape.C
    num_keep = int(shape.keep * (T - 1))
    n = 1 + num_keep

    def tensor(*sizes: int, dtype: torch.dtype = types.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, tokens, branch, vector = tensor(B, T, C), tensor(B, n, C), tensor(B, n, C), tensor(C)
    scores, indices = tensor(B, T, dtype=accumulate_dtype(types.dtype)), tensor(B, n, dtype=torch.int64)
    norm = (vector, vector, 1e-6)
    calls: Iterable[Callable[[], Any]] = (
        lambda: score.token_scores(x, tensor(B, C), *norm),
        lambda: select.select_tokens(scores, num_keep, 1),
        lambda: select.select_gather_norm(x, scores, num_keep, 1, *norm),
        lambda: gather.gather_tokens(x, indices),
        lambda: gather.gather_add_norm(x, indices, branch, vector, 1.0, *norm),
        lambda: scatter.scatter_tokens(x, indices, tokens),
        lambda: scatter.scatter_tokens_(x, indices, tokens),
        lambda: scatter.expand_tokens(tokens, indices, T),
        lambda: scatter.scatter_add_tokens(x, indices, tokens, branch, vector, 1.0),
        lambda: scatter.scatter_add_tokens_(x, indices, tokens, branch, vector, 1.0),
        lambda: norm_backward.gather_norm_backward(branch, x, indices, vector, 1e-6),
        lambda: token_cut_loss(x, x, indices, 1 / 48, 1, "both"),
        lambda: token_cut_loss_backward(scores[0, 0], x, x, indices, scores, scores, 1 / 48, 1, "both"),
    )
    configs = {
        "token_cut_loss": forward_configs(types.dtype, types.precision),
        "token_cut_loss_backward": backward_configs(types.dtype, types.precision),
    }
    found = []
    with matmul_precision(types.precision):
        recorded = [launch for call in calls for launch in record(call)]
    for launch in recorded:
        tuned = configs.get(launch.name)
        found += [launch.configured(config) for config in tuned] if tuned else [launch]
    return found


def compile_launch(launch: Launch, architecture: int) -> Usage:
    compiler = triton_compiler()
    source = compiler.ast_source(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    binary = triton.compile(source, target=compiler.gpu_target("cuda", architecture, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [compiler.cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack, local, binary.metadata.shared)


def _compile(job: tuple[Shape, Types, int, int]) -> Usage:
    shape, types, index, architecture = job
    return compile_launch(_all_launches(shape, types)[index], architecture)


_all_launches = functools.cache(launches)


def table(
    architectures: Iterable[int] = ARCHITECTURES,
    types: Iterable[Types] = TYPES,
    shapes: Iterable[Shape] = SHAPES,
    workers: int = 2,
) -> Iterator[Row]:
    """A row for every kernel, model, type and architecture. What several of them share is compiled once."""
    jobs: dict[tuple[Launch, int], tuple[Shape, Types, int, int]] = {}
    rows = []
    for kind, architecture, shape in itertools.product(types, architectures, shapes):
        for i, launch in enumerate(_all_launches(shape, kind)):
            reasons = tuple(type_reasons(launch.name, [kind.dtype]))
            rows.append(Row(shape.name, kind.name, launch, architecture, None, reasons))
            if not reasons:
                jobs.setdefault((launch, architecture), (shape, kind, i, architecture))
    # A spawned worker imports the kernels itself: CUDA and Triton state do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        usages = dict(zip(jobs, pool.map(_compile, jobs.values()), strict=True))
    for row in rows:
        yield dataclasses.replace(row, usage=usages.get((row.launch, row.architecture)))


def lines(rows: Iterable[Row]) -> Iterator[str]:
    yield (
        f"{'model':12} {'types':12} {'kernel':24} {'sm':>4} {'warps':>5} {'registers':>9} {'stack':>5} {'local':>5}"
        f" {'shared':>6}"
    )
    for row in rows:
        name = f"{row.model:12} {row.types:12} {row.launch.name:24} {row.architecture:4}"
        if row.usage is None:
            yield f"{name} refused: {'; '.join(row.reasons)}"
            continue
        u = row.usage
        warps = dict(row.launch.options)["num_warps"]
        yield f"{name} {warps:5} {u.registers:9} {u.stack:5} {u.local:5} {u.shared:6}"


if __name__ == "__main__":
    for line in lines(table()):
        print(line, flush=True)
