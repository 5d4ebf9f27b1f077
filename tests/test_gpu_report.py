"""bench/gpu_report.py without a GPU: its steps run on the CPU at tiny sizes; a step that fails stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from idlevit_kernels.info import environment

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_report.py"
sys.path.insert(0, str(SCRIPT.parent))  # by its name, so that the processes of the steps can import it
import gpu_report  # noqa: E402

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "_MEASURED", 1e-3)


def rows_of(step: str, **options: Any) -> Rows:
    rows: Rows = []
    gpu_report.SMOKE[step][1](rows.append, 300.0, CPU, **options)
    assert rows and all(v > 0 for row in rows for v in row.values() if isinstance(v, float))
    return rows


def test_ops() -> None:
    rows = rows_of("ops", compiled=False)
    assert all(row["of_copy"] == 1 for row in rows if row["side"] == "copy")
    names = {"token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_"}
    assert {row["op"] for row in rows} == names and {row["mode"] for row in rows} == {"graph", "eager"}
    assert {row["side"] for row in rows} == {"copy", "cpu", "topk, gather, norm"}


def test_the_peer_selects_the_same() -> None:
    import idlevit_kernels as ik

    x, scores, norm = torch.randn(2, 9, 8), torch.randn(2, 9), torch.nn.LayerNorm(8, eps=1e-6)
    with torch.no_grad():
        _, wanted = ik.select_gather_norm(x, scores, 4, 1, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(gpu_report._select_peer(x, scores, 4, norm), wanted)


def test_block() -> None:
    rows = rows_of("block")
    assert [(row["stage"], row["n"]) for row in rows] == [(1, 9), (2, 5), (3, 3)]
    assert rows[0]["overhead"] == pytest.approx(rows[0]["idle_median_us"] / rows[0]["dense_median_us"])


def test_model() -> None:
    speedups = {row["variant"].partition(", k")[0]: row["speedup"] for row in rows_of("model")}
    assert speedups["dense"] == 1 and {"idle", "EViT", "released order"} < set(speedups)
    assert any(variant.startswith("ToMe") for variant in speedups)


def test_training() -> None:
    assert [row["variant"] for row in rows_of("training")] == ["idle", "idle, masked form", "dense"]


# The runner. The steps of these tests run in processes of their own, which find them by name.


def good(add: Any, seconds: float, device: torch.device) -> None:
    add({"name": "a", "value": 1.5, "seconds": seconds})


def bad(add: Any, seconds: float, device: torch.device) -> None:
    add({"name": "before"})
    raise RuntimeError("the [reason]")


def crash(add: Any, seconds: float, device: torch.device) -> None:
    add({"name": "before"})
    os.abort()


def endless(add: Any, seconds: float, device: torch.device) -> None:
    time.sleep(600)


def test_a_failing_step_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"first": (0.25, bad), "second": (0.25, crash), "third": (0.5, good)}
    found = gpu_report.run_steps(1000.0, "cpu", steps)
    assert list(found) == list(steps) and found["third"]["error"] is None
    assert "RuntimeError: the [reason]" in found["first"]["error"]
    assert "exit code -6" in found["second"]["error"]
    assert found["first"]["rows"] == found["second"]["rows"] == [{"name": "before"}]
    assert found["third"]["rows"][0]["seconds"] == pytest.approx(1000.0, rel=0.1), "time is shared anew after each step"

    monkeypatch.setattr(gpu_report, "_START_SECONDS", 2.0)
    assert "was stopped after 4 s" in gpu_report.run_step(endless, 1.0, "cpu")["error"]

    report = {"date": "2026-01-02T03:04:05+00:00", "device_name": "A B/C", "environment": environment(), "steps": found}
    path = gpu_report.write(report, tmp_path / "results")
    assert json.loads(path.read_text()) == report and os.listdir(path.parent) == [path.name]
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    gpu_report.show(report, console)
    text = console.export_text()
    assert "the [reason]" in text and "first: failed" in text and "1.500" in text


def test_a_failing_case_leaves_the_others_and_time_ends_them() -> None:
    def measure(seconds: float, number: int) -> Rows:
        if number == 2:
            raise torch.OutOfMemoryError("out of memory")
        return [{"twice": 2 * number}]

    rows: Rows = []
    with pytest.raises(RuntimeError, match="1 of 3 cases failed"):
        gpu_report.measure_cases(rows.append, 60.0, [{"number": n} for n in (1, 2, 3)], measure)
    assert rows == [
        {"number": 1, "twice": 2}, {"number": 2, "error": "OutOfMemoryError: out of memory"}, {"number": 3, "twice": 6},
    ]  # fmt: skip
    rows = []
    with pytest.raises(TimeoutError, match=r"no time is left for 2 of 3 cases, the first: \{'number': 3\}"):
        gpu_report.measure_cases(rows.append, 0.0, [{"number": n} for n in (1, 3, 4)], measure)
    assert rows == [{"number": 1, "twice": 2}]


def test_tests_are_run_and_what_fails_is_told(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("import time\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_endless(): time.sleep(600)")
    (tmp_path / "pytest.ini").write_text("[pytest]")

    def run(seconds: float, only: str) -> dict[str, Any]:
        rows: Rows = []
        try:
            gpu_report.run_tests(rows.append, seconds, (str(file), "-c", str(tmp_path / "pytest.ini"), "-k", only))
        except Exception as error:
            rows[0]["error"] = str(error)
        return rows[0]

    good = run(60.0, "good")
    assert good["exit_code"] == 0 and "1 passed" in good["summary"] and "error" not in good
    bad = run(60.0, "good or bad")
    assert bad["exit_code"] == 1 and "1 failed, 1 passed" in bad["summary"] and "test_bad" in bad["error"]
    assert run(3.0, "endless")["error"].startswith("stopped after 3 s")


@pytest.mark.full
def test_smoke_runs_every_step() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--seconds", "120"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for step in gpu_report.STEPS:
        assert f"{step}: done" in result.stdout
    assert "nothing is written" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_it_exits_with_2_and_one_line() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured"
    ]
