"""Launch helpers: grid, device guard, tile sizes, and the choice among a few configurations by timing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .... import env

# Elements of a tile of rows: 16 a thread with four warps, which is two 16-byte loads of a half type.
_TILE = 2048
_MAX_ROWS = 16
# Programs beyond which a kernel gives each one more work instead. Streaming kernels need some 16 programs of four
# warps on each of 132 to 170 multiprocessors to keep the memory busy. Where a program starts with a search of its
# own, half of that is better: the search then costs less than the rows it is for.
STREAM_PROGRAMS = 2048
SEARCH_PROGRAMS = 1024
_MAX_STEPS = 8


def row_tile(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Meta arguments of the kernels that hold whole rows in registers.

    The tile is a function of C alone and not tuned by timing: these kernels are bound by memory, any tile near this
    size reaches the same bandwidth, and the order in which a row is summed follows from the tile. With a tile chosen by
    timing, the same image could get other score bits in another process, hence other tokens where scores nearly tie.
    """
    block = max(16, triton.next_power_of_2(channels))
    rows = min(_MAX_ROWS, max(1, _TILE // block))
    tile = {"C": channels, "BLOCK_C": block, "ROWS": rows, "num_warps": max(4, block // 512)}
    if dtype.itemsize >= 4:
        # The assembler aims at many programs at a time and would rather spill a register of a wide row than have one
        # program less: not where it is told how many there may be.
        tile["maxnreg"] = 128 if dtype.itemsize == 4 else 255
    return tile


def walk(batch: int, rows: int, tile_rows: int, programs: int) -> tuple[int, int]:
    """How many tiles a program walks (a run-time argument: nothing is recompiled), and the number of programs.

    One tile while the grid does not fill the GPU, so that B = 1 runs on as many multiprocessors as there are tiles;
    then more, so that a program's parameter vectors and search serve several tiles. Results do not depend on it.
    """
    tiles = batch * triton.cdiv(rows, tile_rows)
    steps = min(_MAX_STEPS, max(1, tiles // programs))
    return steps, batch * triton.cdiv(rows, tile_rows * steps)


def halvings(num_tokens: int, n: int) -> int:
    """Steps of the binary search for a token among n ascending indices: see ``rows.first_slot``."""
    return min(n, num_tokens - n).bit_length()


def contiguous_channels(x: Tensor) -> Tensor:
    """x itself where its channels are contiguous; a copy otherwise."""
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Runs the kernel on the device's current stream; an empty grid is no launch at all.

    Products and sums are fused by choice: Triton's default differs from release to release, and with it the last bits.
    """
    if programs:
        with guard(device):
            kernel[(programs,)](*args, enable_fp_fusion=True, **meta)


_fastest: dict[tuple[Any, ...], dict[str, int]] = {}


def tuned(
    key: tuple[Any, ...], configs: Sequence[dict[str, int]], run: Callable[[dict[str, int]], None], device: torch.device
) -> dict[str, int]:
    """The fastest configuration for the key, timed once a process; the first where timing is off or decides nothing."""
    if len(configs) == 1 or device.type != "cuda" or env.get("IDLEVIT_AUTOTUNE", "1") == "0":
        return configs[0]
    key = (*key, device.index)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():  # timing waits for the device, which a capture forbids
            return configs[0]

        def milliseconds(config: dict[str, int]) -> float:
            try:
                return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20)
            except triton.OutOfResources:  # too much shared memory for this GPU
                return float("inf")

        with guard(device):
            _fastest[key] = min(configs, key=milliseconds)
    return _fastest[key]
