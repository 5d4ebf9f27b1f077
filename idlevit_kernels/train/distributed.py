"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import value_error


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all. With one process every method returns what it was given."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @staticmethod
    def join(device: str | None = None) -> World:
        """Joins the other processes of torchrun, if there are any: over nccl for GPUs and gloo for the rest.

        Args:
            device: "cpu" or "cuda", with an index only for a single process; by default the best there is.
        """
        from timm.utils.distributed import init_distributed_device_so

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = device.partition(":")[0]
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            there = "cpu or cuda" if torch.cuda.is_available() else "cpu (PyTorch finds no CUDA GPU here)"
            raise value_error("train", "device", there, device)
        joined = init_distributed_device_so(device, "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        world = World(joined["global_rank"], joined["world_size"], torch.device(joined["device"]))
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        return world

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; a new tensor on the CPU, in float64."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each process holds, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process holds."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            group = dist.group.WORLD
            dist.destroy_process_group()
            # Not to be freed before the process ends: the destructor of a gloo group joins its threads while this one
            # holds Python's lock, which one of them may be waiting for (one run in ten hung so with PyTorch 2.10).
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
