"""What is installed and what this machine has: the facts that a bug report or a benchmark needs beside it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import env, versions
from ..errors import ArgumentError
from ..ops import backends
from ..ops.backends import cpu
from ..ops.backends.build_info import build_info


def run_facts(command: Sequence[str], device: torch.device, **facts: Any) -> dict[str, Any]:
    """What stands above the figures of a run, as plain JSON types: how to run it again, when and on what it ran.

    Args:
        command: the words of the command line.
        device: what the figures are of.
        facts: what else decides the figures, such as the model and its input.
    """
    return {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "device": str(device),
        "device_name": device_name(device),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions and devices, as plain JSON types; None for what is absent."""
    return {
        "version": versions.PACKAGE,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": versions.installed("triton"),
        "timm": versions.installed("timm"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": cuda(),
    }


def collect() -> dict[str, Any]:
    """Everything that ``idlevit info`` shows."""
    return {
        "environment": environment(),
        "libraries": versions.libraries(),
        "fast_paths": [gate._asdict() for gate in versions.report()],
        "backends": {name: {"usable": not why, "reasons": why} for name, why in backend_reasons().items()},
        "cpu_instruction_set": instruction_sets(),
        "build": build_info(),
        "variables": {
            name: {"value": os.environ.get(name), "meaning": meaning, "error": _variable_error(name)}
            for name, meaning in env.VARIABLES.items()
        },
    }


def backend_reasons() -> dict[str, list[str]]:
    """Why each backend cannot run on this machine; empty for one that can."""
    found = {}
    for name in backends.BACKENDS:
        try:
            found[name] = backends.named(name).installed()
        except Exception as error:  # a broken installation is what this is asked about: tell it, whatever it is
            found[name] = [f"{type(error).__name__}: {error}"]
    return found


def _variable_error(name: str) -> str | None:
    """What is wrong with the variable's value; None if nothing is, or no value is refused."""
    try:
        if name == "IDLEVIT_BACKEND":
            backends.check_name(env.get(name, "auto"), name, "the name")
        elif name == "IDLEVIT_CPU_ISA":
            cpu.extension()
    except ArgumentError as error:
        return str(error)
    except ImportError:  # `backend_reasons` tells it
        pass
    return None


def instruction_sets() -> dict[str, Any]:
    """Of the native CPU kernels (the one in use, and those this processor can run), and what torch uses."""
    try:
        extension = cpu.extension()
    except (ImportError, ArgumentError):  # `backend_reasons` tells it
        extension = None
    return {
        "in_use": extension and extension.cpu_instruction_set(),
        "available": list(extension.cpu_instruction_sets()) if extension else [],
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def cuda() -> dict[str, Any]:
    driver = None
    if shutil.which("nvidia-smi"):
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "torch_built_for": torch.version.cuda,
        "driver": driver and driver.splitlines()[0],
        "devices": [
            {"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_gib": round(d.total_memory / 2**30, 1)}
            for d in devices
        ],
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def commit() -> str | None:
    """The commit of the source tree that the package runs from, "-dirty" if it was changed; None if it is installed."""
    folder = Path(__file__).parent
    git = ("git", "-C", str(folder))
    if not shutil.which("git") or _output(*git, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None
