from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, subprocess, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError(f"something started a process or touched CUDA: {args}")

subprocess.Popen = torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
before = set(sys.modules)
import idlevit_kernels
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
print(torch.cuda.is_initialized())
"""
HEAVY = {"triton", "timm", "torchvision", "typer", "rich", "matplotlib", "onnx", "sklearn", "tensorboard", "cuda"}


def test_import_is_lean() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    loaded, cuda_initialised = result.stdout.splitlines()
    assert not HEAVY & set(json.loads(loaded))
    assert cuda_initialised == "False"


def test_ops_on_the_cpu_need_no_heavy_import() -> None:
    script = (
        "import sys, torch, idlevit_kernels as ik\n"
        "before = set(sys.modules)\n"
        "ik.scatter_tokens(torch.ones(1, 4, 8), ik.select_tokens(torch.rand(1, 4), 2), torch.zeros(1, 3, 8))\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert not HEAVY & set(result.stdout.split())
