"""bench/gpu_report.py without a GPU: its steps run on the CPU at tiny sizes; a step that fails stops no other."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from idlevit_kernels.info import environment
from idlevit_kernels.roofline import Shape

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_report.py"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def positive(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and all(v > 0 for row in rows for v in row.values() if isinstance(v, float))


def test_ops(gpu_report: ModuleType) -> None:
    rows: list[dict[str, Any]] = []
    gpu_report.ops(rows, 0.1, CPU, Shape(2, 17, 9, 32, 2, torch.float32), compiled=False)
    assert positive(rows) and {row["op"]: row["of_copy"] for row in rows}["copy"] == 1
    assert {"token_scores", "select_gather_norm", "gather_add_norm", "scatter_add"} < {row["op"] for row in rows}


def test_the_peer_selects_the_same(gpu_report: ModuleType) -> None:
    import idlevit_kernels as ik

    x, scores, norm = torch.randn(2, 9, 8), torch.randn(2, 9), torch.nn.LayerNorm(8, eps=1e-6)
    with torch.no_grad():
        _, wanted = ik.select_gather_norm(x, scores, 4, 1, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(gpu_report._select_peer(x, scores, 4, norm), wanted)


def test_block(gpu_report: ModuleType) -> None:
    rows: list[dict[str, Any]] = []
    gpu_report.block(rows, 4.0, CPU, {"tiny": (17, 32, 2)}, (1, 2), (0.5,), torch.float32)
    assert positive(rows) and [row["B"] for row in rows] == [1, 2]
    row = rows[0]
    assert row["overhead"] == pytest.approx(row["idle_median_us"] / row["dense_median_us"])


def test_model(gpu_report: ModuleType) -> None:
    rows: list[dict[str, Any]] = []
    gpu_report.model(rows, 0.1, CPU, "vit_tiny_patch16_224", (1,), torch.float32, compiled=False)
    assert positive(rows) and {r["variant"] for r in rows} == {"dense", "idle", "dense graph", "idle graph"}
    assert {r["variant"]: r["speedup"] for r in rows}["dense"] == 1


def test_training(gpu_report: ModuleType) -> None:
    rows: list[dict[str, Any]] = []
    gpu_report.training(rows, 0.1, CPU, "vit_tiny_patch16_224", (1,))
    assert positive(rows) and [row["variant"] for row in rows] == ["dense", "idle"]


def test_a_failing_step_is_recorded_and_the_others_run(gpu_report: ModuleType, tmp_path: Path) -> None:
    shares: list[float] = []

    def good(rows: list[dict[str, Any]], seconds: float, device: torch.device) -> None:
        shares.append(seconds)
        rows.append({"name": "a", "value": 1.5})

    def bad(rows: list[dict[str, Any]], seconds: float, device: torch.device) -> None:
        rows.append({"name": "before"})
        raise RuntimeError("the [reason]")

    steps = {"first": (0.25, good), "second": (0.25, bad), "third": (0.5, good)}
    found = gpu_report.run_steps(8.0, CPU, steps)
    assert list(found) == list(steps) and [found[name]["error"] is None for name in steps] == [True, False, True]
    assert "RuntimeError: the [reason]" in found["second"]["error"]
    assert found["second"]["rows"] == [{"name": "before"}]
    assert shares == [pytest.approx(2.0, rel=0.1), pytest.approx(8.0, rel=0.1)], "time is shared anew after each step"

    report = {"date": "2026-01-02T03:04:05+00:00", "device_name": "A B/C", "environment": environment(), "steps": found}
    path = gpu_report.write(report, tmp_path / "results")
    assert json.loads(path.read_text()) == report and os.listdir(path.parent) == [path.name]
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    gpu_report.show(report, console)
    text = console.export_text()
    assert "the [reason]" in text and "second: failed" in text and "1.500" in text


def test_cases_stop_when_the_time_is_over(gpu_report: ModuleType) -> None:
    done: list[int] = []
    with pytest.raises(TimeoutError, match="no time is left for \\[2, 3\\]"):
        for case in gpu_report.within(0.0, [1, 2, 3]):
            done.append(case)
    assert done == [1] and list(gpu_report.within(60.0, [1, 2])) == [1, 2]


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [(0, "....\n4 passed, 9 deselected", None), (1, "1 failed", "exited with 1"), (0, "3 skipped", "no GPU test ran")],
)
def test_correctness(
    code: int, output: str, message: str | None, gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, stdout=output, stderr="")
    monkeypatch.setattr(gpu_report.subprocess, "run", lambda *_, **__: done)
    rows: list[dict[str, Any]] = []
    if message is None:
        gpu_report.correctness(rows, 1.0, CPU)
    else:
        with pytest.raises(RuntimeError, match=message):
            gpu_report.correctness(rows, 1.0, CPU)
    assert rows[0]["exit_code"] == code and rows[0]["summary"] == output.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_it_exits_with_2_and_one_line() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured"
    ]
