"""Every environment variable that the package reads at run time, in one table (`idlevit info` prints it)."""

from __future__ import annotations

import os

VARIABLES = {
    "IDLEVIT_BACKEND": "backend of every op that is not given one: auto (default), reference, cpu, triton, cuda",
    "IDLEVIT_CPU_ISA": "instruction set of the CPU kernels: baseline, avx2, avx512 (default: the best one there is)",
    "IDLEVIT_AUTOTUNE": "1 (default): Triton kernels bound by arithmetic time a few tile sizes on first use; 0: off",
}


def get(name: str, default: str) -> str:
    if name not in VARIABLES:
        raise KeyError(f"{name} is not in idlevit_kernels.env.VARIABLES")
    return os.environ.get(name, default)
