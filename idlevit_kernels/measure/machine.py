"""What a command runs on: the device, the type and the threads that its options name. Errors begin with ``op``."""

from __future__ import annotations

import torch

from ..errors import value_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def set_threads(op: str, threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise value_error(op, "threads", "at least 1", threads)
        torch.set_num_threads(threads)


def find_dtype(op: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise value_error(op, "dtype", f"one of {', '.join(DTYPES)}", name)
    return DTYPES[name]


def find_device(op: str, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise value_error(op, "device", "cpu, cuda or cuda:<index>", name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise value_error(op, "device", f"one that there is (PyTorch finds {count} CUDA GPUs here)", name)
    return device
