"""What an idle block must cost: bytes and FLOPs of each step, and the time that a device's peaks allow for them.

``python -m idlevit_kernels.measure.roofline`` prints the tables; ``--measure`` sets the CPU's prediction beside a
measurement. A prediction is a lower bound on each step: every tensor is read and written once, at the peak rates, and
steps do not overlap. FLOPs are those of matrix products, as ``count_macs`` counts them; the rest is bound by memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from torch.nn import functional as F

from .. import versions
from ..block import idle_block
from ..block.latency import rotating
from ..block.timing import Timing, alternate
from ..ops import reference as ops
from ..ops.cases import Sizes
from ..ops.record import Op
from ..schedule import num_kept
from .tables import console_for


@dataclasses.dataclass(frozen=True)
class Shape:
    """B images of T tokens with C channels and H heads, n of them computed (prefix tokens included)."""

    B: int
    T: int
    n: int
    C: int
    H: int
    dtype: torch.dtype = torch.bfloat16
    mlp_ratio: int = 4


@dataclasses.dataclass(frozen=True)
class Step:
    """FLOPs, bytes moved to and from memory, and the number of kernels that do it."""

    name: str
    flops: int
    bytes: int
    kernels: int = 1


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates in FLOP/s and bytes/s, and the seconds that a kernel costs however small it is."""

    name: str
    flops: float
    bandwidth: float
    launch: float
    fuses_gelu: bool = False  # GELU is applied by the product before it, not by a kernel of its own

    def seconds(self, steps: Sequence[Step]) -> float:
        return sum(max(s.flops / self.flops, s.bytes / self.bandwidth) + s.kernels * self.launch for s in steps)


# An assumption, not a published figure: what starting, filling and draining one small kernel costs inside a CUDA graph.
# Launched one by one from Python, a kernel costs several times that.
_GPU_LAUNCH = 2e-6

# Dense bfloat16 tensor-core rate with float32 accumulation (data sheets print twice that, for sparse matrices), and
# memory bandwidth. NVIDIA's H200 SXM, H100 SXM and A100 SXM 80 GB data sheets, and appendix A of the Ada white paper.
GPUS = (
    Device("H200", 989.5e12, 4.8e12, _GPU_LAUNCH),
    Device("H100", 989.5e12, 3.35e12, _GPU_LAUNCH),
    Device("A100", 312e12, 2.039e12, _GPU_LAUNCH),
    Device("RTX 4090", 165.2e12, 1.008e12, _GPU_LAUNCH),
)


def idle_block_steps(shape: Shape, fused_gelu: bool = False, inplace: bool = False) -> list[Step]:
    """The chain of ``idle_block`` with fused kernels; ``inplace`` writes the kept rows only."""
    B, T, C = shape.B, shape.T, shape.C
    sizes = Sizes(B, T, shape.n, C, shape.dtype)

    def step(op: Op[..., Any], flops: int = 0, kernels: int = 1) -> Step:
        return Step(op.name, flops, op.bytes_moved(sizes), kernels)

    macs = ops.cls_direction.macs
    assert macs is not None
    return [
        # LayerNorm of one token an image, its query, and that times the key weights.
        step(ops.cls_direction, 2 * macs((B, T, C), None, None, None, (3 * C, C), None), kernels=3),
        step(ops.token_scores),
        step(ops.select_gather_norm),
        *_attention(shape),
        step(ops.gather_add_norm),
        *_mlp(shape, fused_gelu),
        step(ops.scatter_add_tokens_ if inplace else ops.scatter_add_tokens),
    ]


def dense_block_steps(shape: Shape, fused_gelu: bool = False) -> list[Step]:
    """timm's block on [B, n, C] in eager mode: the floor that an idle block is compared with."""
    rows = shape.B * shape.n * shape.C * shape.dtype.itemsize
    norm = 2 * rows + 2 * shape.C * shape.dtype.itemsize
    return [
        Step("norm1", 0, norm),
        *_attention(shape),
        Step("add", 0, 3 * rows),
        Step("norm2", 0, norm),
        *_mlp(shape, fused_gelu),
        Step("add", 0, 3 * rows),
    ]


def _linear(name: str, shape: Shape, inputs: int, outputs: int) -> Step:
    tokens = shape.B * shape.n
    elements = tokens * (inputs + outputs) + (inputs + 1) * outputs
    return Step(name, 2 * tokens * inputs * outputs, elements * shape.dtype.itemsize)


def _attention(shape: Shape) -> list[Step]:
    B, n, C = shape.B, shape.n, shape.C
    return [
        _linear("qkv", shape, C, 3 * C),
        Step("attention", 4 * B * n * n * C, 4 * B * n * C * shape.dtype.itemsize),  # its logits stay on the chip
        _linear("proj", shape, C, C),
    ]


def _mlp(shape: Shape, fused_gelu: bool) -> list[Step]:
    hidden = shape.mlp_ratio * shape.C
    fc1 = _linear("fc1 + GELU", shape, shape.C, hidden)
    if not fused_gelu:
        gelu = 2 * shape.B * shape.n * hidden * shape.dtype.itemsize
        fc1 = dataclasses.replace(fc1, bytes=fc1.bytes + gelu, kernels=2)
    return [fc1, _linear("fc2", shape, hidden, shape.C)]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of the idle block and of the dense block on its kept tokens, and their ratio."""

    idle: float
    dense: float

    @property
    def overhead(self) -> float:
        return self.idle / self.dense


def predict(shape: Shape, device: Device, inplace: bool = False) -> Prediction:
    # timm's own block, the floor, calls GELU as a module wherever it runs.
    idle = device.seconds(idle_block_steps(shape, device.fuses_gelu, inplace))
    return Prediction(idle, device.seconds(dense_block_steps(shape)))


# The CPU: peaks are measured, for nobody publishes them for the cores and threads at hand.


@torch.inference_mode()
def measure_cpu(copied_bytes: int, seconds: float = 1.0) -> Device:
    """Peak rates of float32 on this machine's CPU with the present number of threads.

    Args:
        copied_bytes: size of the tensor whose copying gives the bandwidth: small ones stay in a cache, as they do
            between the steps of a block.
        seconds: how long to measure.
    """
    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    source = torch.ones(max(1, copied_bytes // 4))
    target, one = torch.empty_like(source), torch.ones(1)
    calls: dict[str, Callable[[], Any]] = {
        "blas": lambda: F.linear(a, b),
        "copy": lambda: target.copy_(source),
        "launch": lambda: one.add_(1),
    }
    if not versions.onednn_reason():
        calls["onednn"] = lambda: versions.onednn_linear(a, b, None)
    timings = alternate(calls, seconds)
    # Peaks, hence the quick end of the samples; a copy reads and writes.
    product = min(timings[name].p20 for name in ("blas", "onednn") if name in timings)
    bandwidth = 2 * source.nbytes / timings["copy"].p20
    return Device("this CPU", 2 * side**3 / product, bandwidth, timings["launch"].p20, fuses_gelu=True)


@torch.inference_mode()
def measure_block(shape: Shape, seconds: float = 2.0) -> dict[str, Timing]:
    """Times of ``idle`` and ``dense`` on the CPU: an idle block on [B, T, C], timm's block on [B, n, C]."""
    from timm.models.vision_transformer import Block

    block = Block(shape.C, shape.H, mlp_ratio=shape.mlp_ratio, qkv_bias=True).eval().to(shape.dtype)
    tokens = [torch.randn(shape.B, shape.T, shape.C, dtype=shape.dtype) for _ in range(3)]
    kept = [x[:, : shape.n].contiguous() for x in tokens]
    calls = {
        "idle": rotating(lambda x: idle_block(x, block, shape.n - 1), tokens),
        "dense": rotating(block, kept),
    }
    return alternate(calls, seconds)


# The tables.

_DEIT_S = {"T": 197, "C": 384, "H": 6}


def deit_s(batch: int, stage: int, keep_ratio: float = 0.7, dtype: torch.dtype = torch.bfloat16) -> Shape:
    """An idle layer of DeiT-S: stage 1, 2 or 3 keeps r, r^2 or r^3 of its image tokens."""
    return Shape(batch, n=1 + num_kept(keep_ratio**stage, _DEIT_S["T"] - 1), dtype=dtype, **_DEIT_S)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def steps_table(shape: Shape, devices: Sequence[Device], inplace: bool) -> Table:
    dtype = str(shape.dtype).removeprefix("torch.")
    title = f"Steps of an idle block, B = {shape.B}, T = {shape.T}, n = {shape.n}, C = {shape.C}, {dtype}"
    table = _table(title, "step", "kernels", "GFLOP", "MB", *(f"{d.name}\nus" for d in devices))
    steps = idle_block_steps(shape, inplace=inplace)
    dense = dense_block_steps(shape)
    for name, group in [*((s.name, [s]) for s in steps), ("idle block", steps), ("dense block on n tokens", dense)]:
        if name == "idle block":
            table.add_section()
        total = [sum(getattr(s, field) for s in group) for field in ("kernels", "flops", "bytes")]
        times = (f"{1e6 * d.seconds(group):.1f}" for d in devices)
        table.add_row(name, str(total[0]), f"{total[1] / 1e9:.2f}", f"{total[2] / 1e6:.2f}", *times)
    return table


def overhead_table(shapes: Sequence[Shape], devices: Sequence[Device], inplace: bool) -> Table:
    columns = (f"{d.name}\nidle / dense us = overhead" for d in devices)
    table = _table("Idle block over the dense block on its n tokens, predicted", "batch", "n", *columns)
    for shape in shapes:
        found = (predict(shape, device, inplace) for device in devices)
        cells = (f"{1e6 * p.idle:.1f} / {1e6 * p.dense:.1f} = {p.overhead:.3f}" for p in found)
        table.add_row(str(shape.B), str(shape.n), *cells)
    return table


def cpu_table(shapes: Sequence[Shape], seconds: float | None) -> Table:
    """The CPU's prediction and, with ``seconds`` for each shape, the measurement beside it (medians)."""
    measured = ("idle ms\nmeasured", "dense ms\nmeasured", "overhead\nmeasured") if seconds else ()
    table = _table(
        f"This CPU, float32, {torch.get_num_threads()} threads: DeiT-S predicted from rates measured now",
        *("batch", "n", "GFLOP/s", "GB/s", "us a call", "idle ms", "dense ms", "overhead", *measured),
    )
    devices: dict[int, Device] = {}
    for shape in shapes:
        if shape.B not in devices:
            devices[shape.B] = measure_cpu(4 * shape.B * shape.T * shape.C)
        device = devices[shape.B]
        p = predict(shape, device)
        rates = (f"{device.flops / 1e9:.0f}", f"{device.bandwidth / 1e9:.1f}", f"{1e6 * device.launch:.1f}")
        cells = [*rates, f"{1e3 * p.idle:.2f}", f"{1e3 * p.dense:.2f}", f"{p.overhead:.3f}"]
        if seconds:
            timings = measure_block(shape, seconds)
            idle, dense = timings["idle"].median, timings["dense"].median
            cells += [f"{1e3 * idle:.2f}", f"{1e3 * dense:.2f}", f"{idle / dense:.3f}"]
        table.add_row(str(shape.B), str(shape.n), *cells)
    return table


def main(
    measure: Annotated[bool, typer.Option("--measure", help="Time the blocks on this CPU as well.")] = False,
    seconds: Annotated[float, typer.Option(help="Of measuring, for each shape.", min=0.1)] = 2.0,
    batch: Annotated[list[int], typer.Option(help="Repeat it for several.", min=1)] = [1, 8, 32, 256],  # noqa: B006
    inplace: Annotated[bool, typer.Option("--inplace", help="The block writes into its input (GPUs).")] = False,
) -> None:
    """Prints what the idle block of DeiT-S must cost on several devices (keep ratio 0.7, its three stages)."""
    shapes = [deit_s(b, stage) for b in batch for stage in (1, 2, 3)]
    on_gpus = steps_table(shapes[-3], GPUS, inplace), overhead_table(shapes, GPUS, inplace)
    console = console_for(*on_gpus)
    console.print(*on_gpus, sep="\n")
    console.print(
        f"GPUs: bfloat16, published peaks, and {1e6 * _GPU_LAUNCH:g} us for each kernel (assumed). Not measured.\n",
        style="dim",
    )
    on_cpu = [dataclasses.replace(shape, dtype=torch.float32) for shape in shapes]
    table = cpu_table(on_cpu, seconds if measure else None)
    console_for(table).print(table)


if __name__ == "__main__":
    typer.run(main)
