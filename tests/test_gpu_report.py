"""bench/gpu_report.py without a GPU: its steps run on the CPU at tiny sizes; what fails harms no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))  # by their names, so that the processes of the steps can import them
import gpu_report  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_steps import Plan  # noqa: E402

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "_MEASURED", 1e-3)


def rows_of(step: str, **options: Any) -> Rows:
    rows: Rows = []
    for part in gpu_steps.SMOKE[step].parts.values():
        part(rows.append, 300.0, CPU, **options)
    assert rows and all(v > 0 for row in rows for v in row.values() if isinstance(v, float))
    return rows


def test_ceilings() -> None:
    rows = {row["ceiling"]: row for row in rows_of("ceilings")}
    assert "GB_per_s" in rows["copy"] and "TFLOP_per_s" in rows["product"] and len(rows) == 4


def test_ops() -> None:
    rows = rows_of("ops")
    assert all(row["of_copy"] == 1 for row in rows if row["side"] == "copy")
    names = {"token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_"}
    assert {row["op"] for row in rows} == names and {row["mode"] for row in rows} == {"graph", "eager"}
    assert {row["side"] for row in rows} == {"copy", "cpu", "topk, gather, norm"}


def test_the_peer_selects_the_same() -> None:
    import idlevit_kernels as ik

    x, scores, norm = torch.randn(2, 9, 8), torch.randn(2, 9), torch.nn.LayerNorm(8, eps=1e-6)
    with torch.no_grad():
        _, wanted = ik.select_gather_norm(x, scores, 4, 1, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(gpu_steps.select_peer(x, scores, 4, norm), wanted)


def test_block() -> None:
    rows = rows_of("block")
    assert [(row["stage"], row["n"], row["backend"]) for row in rows] == [(1, 9, "cpu"), (3, 3, "cpu")]
    assert rows[0]["overhead"] == pytest.approx(rows[0]["idle_median_us"] / rows[0]["dense_n_median_us"])
    assert rows[0]["speedup"] == pytest.approx(rows[0]["dense_T_median_us"] / rows[0]["idle_median_us"])


def test_models() -> None:
    assert {row["variant"]: row["baseline"] for row in rows_of("model")} == {"dense": "dense", "idle": "dense"}
    names = {row["variant"].partition(",")[0] for row in rows_of("peers")}
    assert names == {"dense", "idle", "EViT", "ToMe"}


def test_training() -> None:
    assert [row["variant"] for row in rows_of("training")] == ["idle", "idle, masked form", "dense"]


def test_trace() -> None:
    assert [row["side"] for row in rows_of("trace")] == ["dense", "cpu"]


def test_counters_of_ncu_are_read() -> None:
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","1","_token_scores(...)","GPU Speed Of Light Throughput","Duration","us","12.5"',
        '"0","1","_token_scores(...)","GPU Speed Of Light Throughput","DRAM Throughput","%","81.0"',
        '"0","1","_token_scores(...)","GPU Speed Of Light Throughput","Elapsed Cycles","cycle","1,000"',
        '"1","1","_select(...)","Launch Statistics","Registers Per Thread","register/thread","40"',
    ]
    assert gpu_steps.counter_rows(lines) == [
        {"kernel": "_token_scores", "Duration us": "12.5", "DRAM Throughput %": "81.0"},
        {"kernel": "_select", "Registers Per Thread register/thread": "40"},
    ]
    assert gpu_steps.counter_rows(["==ERROR== no permission"]) == []


# Every op in processes of their own. The jobs of these tests are found by their names.


def job(kind: str) -> Rows:
    if kind == "raises":
        raise ValueError("the reason")
    if kind == "ends":
        os.abort()
    if kind == "hangs":
        time.sleep(600)
    return [{"status": "right", "process": os.getpid()}]


def test_what_ends_a_process_costs_its_own_job_alone() -> None:
    jobs = [(kind,) for kind in ("fine", "ends", "fine", "raises", "fine", "hangs", "fine")]
    found = [(kind, row) for (kind,), (row,) in gpu_steps.isolated(job, jobs, 2, 120.0, longest=15.0)]
    assert sorted(kind for kind, _ in found) == sorted(kind for (kind,) in jobs)
    messages = {kind: row.get("message", "") for kind, row in found}
    assert messages["raises"] == "ValueError: the reason"
    assert "exit code -6" in messages["ends"] and "stopped after" in messages["hangs"]
    assert sum(row["status"] == "right" for _, row in found) == 4


def test_jobs_end_in_time() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="no time is left for 1 of 3 jobs"):
        list(gpu_steps.isolated(job, [("hangs",)] * 3, 2, 3.0, longest=60.0))
    assert time.monotonic() - begin < 60


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_steps.testing.Case(1, 9, 8, 3)
    (right,) = gpu_steps.check_case("token_scores", "cpu", case, "cpu")
    assert right["status"] == "right" and right["error"] < 1e-6
    (refused,) = gpu_steps.check_case("token_scores", "cuda", case, "cpu")
    assert refused["status"] == "refused" and "CUDA" in refused["message"]
    monkeypatch.setattr(gpu_steps.testing, "run", lambda *_: [torch.zeros(1, 10)])
    (wrong,) = gpu_steps.check_case("token_scores", "cpu", case, "cpu")
    assert wrong["status"] == "wrong" and wrong["message"].startswith("token_scores: output 0 has error")


def test_rows_of_tests(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("import time\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_endless(): time.sleep(600)")
    (tmp_path / "pytest.ini").write_text("[pytest]")

    def run(seconds: float, only: str) -> tuple[Rows, str]:
        rows: Rows = []
        selection = (str(file), "-c", str(tmp_path / "pytest.ini"), "-k", only)
        try:
            gpu_steps.tests(rows.append, seconds, CPU, selection, workers=1)
        except Exception as error:
            return rows, str(error)
        return rows, ""

    rows, error = run(120.0, "good")
    assert [row["outcome"] for row in rows] == ["passed"] and not error
    rows, error = run(120.0, "good or bad")
    assert [row["outcome"] for row in rows] == ["passed", "failed"] and "assert 0" in rows[1]["message"]
    assert "pytest exited with 1" in error
    rows, error = run(20.0, "good or endless")
    assert [row["outcome"] for row in rows] == ["passed"] and error.startswith("stopped after 20 s"), "rows are kept"


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
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    add({"name": "before", "child": child.pid})
    time.sleep(600)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_failing_part_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    plans = {
        "first": Plan(10, {"": bad}),
        "second": Plan(20, {"a": crash, "b": endless}),
        "third": Plan(30, {"": good}),
    }
    begin = time.monotonic()
    assert list(gpu_report.run_steps(plans, 60.0, "cpu", tmp_path)) == list(plans)
    assert time.monotonic() - begin < 60
    found = {name: gpu_report.read(tmp_path / f"{name}.jsonl") for name in plans}
    for lines in found.values():
        assert lines[0]["kind"] == "begin" and lines[-1]["kind"] == "end"
        assert {"torch", "triton", "commit", "cuda"} <= set(lines[0]["environment"])
    assert "RuntimeError: the [reason]" in found["first"][-1]["error"]
    ends = [line for line in found["second"] if line["kind"] == "end"]
    assert [end["part"] for end in ends] == ["a", "b"]
    assert "exit code -6" in ends[0]["error"] and "TimeoutError: stopped after" in ends[1]["error"]
    rows = [line for line in found["second"] if line["kind"] == "row"]
    assert [row["name"] for row in rows] == ["before", "before"] and not alive(rows[1]["child"])
    assert found["third"][-1]["error"] is None and found["third"][1]["seconds"] > 10, "time is shared anew"

    lines = [line for name in plans for line in found[name]]
    console = Console(record=True, width=gpu_report.WIDTH, file=open(os.devnull, "w"))
    for name in plans:
        gpu_report.show(name, found[name], console)
    assert not gpu_report.summary(list(plans), lines, console)
    text = console.export_text()
    assert (
        "the [reason]" in text and "1 of 1 parts failed" in text and "2 of 2 parts failed" in text and "1.500" in text
    )
    assert max(map(len, text.splitlines())) <= 150 and "third" in text.splitlines()[-2]


def test_bars() -> None:
    def row(step: str, **values: Any) -> dict[str, Any]:
        return {"kind": "row", "step": step, **values}

    small = {"model": "deit_small_patch16_224", "variant": "idle, graph"}
    lines = [
        row("correct", status="right"), row("correct", status="wrong"), row("tests", outcome="passed"),
        row("ops", side="triton", B=256, mode="graph", of_copy=0.9),
        row("ops", side="triton", B=8, mode="graph", of_copy=0.1),
        row("block", backend="triton", B=256, overhead=1.05), row("block", backend="triton", B=8, overhead=1.5),
        row("model", B=256, speedup=1.4, **small), row("model", B=8, speedup=0.9, **small),
    ]  # fmt: skip
    found = {name: (value, held) for name, _, value, held in gpu_report.bars(lines)}
    assert found == {
        "cases of ops that are wrong or fail": (1.0, False),
        "tests that fail": (0.0, True),
        "bytes/s of every op over a copy, B 256, triton": (0.9, True),
        "idle over dense block on n tokens, B 256, triton": (1.05, True),
        "DeiT-S over dense, graphs, B 256": (1.4, True),
        "DeiT-S over dense, graphs, B 8 and more": (0.9, False),
    }
    assert gpu_report.bars([row("trace", side="cpu")]) == []


def test_a_failing_case_leaves_the_others_and_time_ends_them() -> None:
    def measure(seconds: float, number: int) -> Rows:
        if number == 2:
            raise torch.OutOfMemoryError("out of memory")
        return [{"twice": 2 * number}]

    rows: Rows = []
    with pytest.raises(RuntimeError, match="1 of 3 cases failed"):
        gpu_steps.measure_cases(rows.append, 60.0, [{"number": n} for n in (1, 2, 3)], measure)
    assert rows == [
        {"number": 1, "twice": 2}, {"number": 2, "error": "OutOfMemoryError: out of memory"}, {"number": 3, "twice": 6},
    ]  # fmt: skip
    rows = []
    with pytest.raises(TimeoutError, match=r"no time is left for 2 of 3 cases, the first: \{'number': 3\}"):
        gpu_steps.measure_cases(rows.append, 0.0, [{"number": n} for n in (1, 3, 4)], measure)
    assert rows == [{"number": 1, "twice": 2}]


def rows_in(folder: Path) -> Rows:
    return [line for path in folder.glob("*.jsonl") for line in gpu_report.read(path) if line["kind"] == "row"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("gpu_report.py", signal.SIGTERM),
        pytest.param("gpu_report.py", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("first_contact.sh", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("first_contact.sh", signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_killed_half_way_it_keeps_its_rows(script: str, how: signal.Signals, tmp_path: Path) -> None:
    """And leaves no process behind that would go on measuring."""
    interpreter = ["bash"] if script.endswith(".sh") else [sys.executable]
    process = subprocess.Popen(
        [*interpreter, str(BENCH / script), "--smoke"],
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while len(rows_in(tmp_path)) < 8 and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, how)
        process.wait(timeout=60)
    kept = rows_in(tmp_path)
    assert len(kept) >= 8
    time.sleep(2)
    after = rows_in(tmp_path)
    time.sleep(4)
    assert rows_in(tmp_path) == after, "something still writes"


@pytest.mark.full
@pytest.mark.parametrize("script", ["gpu_report.py", "first_contact.sh"])
def test_smoke_runs_every_step_in_its_time(script: str, tmp_path: Path) -> None:
    interpreter = ["bash"] if script.endswith(".sh") else [sys.executable]
    begin = time.monotonic()
    result = subprocess.run(
        [*interpreter, str(BENCH / script), "--smoke", "--output", str(tmp_path)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - begin < 260
    steps = list(gpu_steps.STEPS)[: 5 if script.endswith(".sh") else None]
    assert {path.stem for path in tmp_path.iterdir()} == set(steps)
    for step in steps:
        lines = [json.loads(line) for line in (tmp_path / f"{step}.jsonl").read_text().splitlines()]
        assert lines[0]["kind"] == "begin" and lines[-1]["kind"] == "end"
        assert not any(line["error"] for line in lines if line["kind"] == "end"), step
    assert "failed" not in result.stdout


def test_unknown_steps_are_refused() -> None:
    with pytest.raises(SystemExit, match="--steps must be some of ceilings,.*, got blocks"):
        gpu_report.main(["--smoke", "--steps", "blocks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_it_exits_with_2_and_one_line() -> None:
    script = str(BENCH / "gpu_report.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "gpu_report: needs an NVIDIA GPU, and PyTorch finds none here; nothing was measured"
    ]
