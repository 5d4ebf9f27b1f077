from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from idlevit_kernels import __version__, env, versions
from idlevit_kernels.block import timing
from idlevit_kernels.cli import app, evaluate, shared, tune
from idlevit_kernels.measure import benchmark
from idlevit_kernels.ops.backends import BACKENDS
from idlevit_kernels.train import task

SMALL = ["--model", "deit_tiny_patch16_224", "--image-size", "64", "--seconds", "0.5", "--device", "cpu"]


def run(*arguments: str, code: int = 0):
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result


def test_module_runs_and_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "idlevit_kernels", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "info" in done.stdout and "bench" in done.stdout


def test_info_text_names_versions_backends_and_variables():
    text = run("info").stdout
    for name in (__version__, torch.__version__, *BACKENDS, *env.VARIABLES):
        assert name in text


def test_info_text_names_floors_and_fast_paths():
    text = " ".join(run("info").stdout.split())
    for name, library in versions.libraries().items():
        assert f"{name} {library['installed'] or 'not installed'}" in text and f"({library['floor']} or newer)" in text
    for gate in versions.report():
        assert f"{gate.name} {'on' if gate.available else 'off'}" in text


def test_info_tells_of_a_version_below_the_floor(monkeypatch):
    monkeypatch.setitem(versions.FLOORS, "torch", "99.1")
    assert f"{torch.__version__}, older than 99.1" in " ".join(run("info").stdout.split())
    libraries = json.loads(run("info", "--json").stdout)["libraries"]
    assert libraries["torch"] == {"installed": torch.__version__, "floor": "99.1", "too_old": True}
    assert libraries["timm"]["too_old"] is False


def test_info_json_gives_every_reason(monkeypatch):
    monkeypatch.setenv("IDLEVIT_BACKEND", "auto")
    facts = json.loads(run("info", "--json").stdout)
    assert facts["environment"]["torch"] == torch.__version__
    assert list(facts["backends"]) == list(BACKENDS)
    assert facts["backends"]["reference"] == {"usable": True, "reasons": []}
    for backend in facts["backends"].values():
        assert backend["usable"] == (not backend["reasons"])
    assert facts["variables"]["IDLEVIT_BACKEND"]["value"] == "auto"
    assert facts["variables"]["IDLEVIT_BACKEND"]["error"] is None


def test_info_tells_of_a_variable_with_a_bad_value(monkeypatch):
    monkeypatch.setenv("IDLEVIT_BACKEND", "fastest")
    error = json.loads(run("info", "--json").stdout)["variables"]["IDLEVIT_BACKEND"]["error"]
    assert error.startswith("IDLEVIT_BACKEND: the name must be one of") and error.endswith("got 'fastest'")
    assert "got 'fastest'" in " ".join(run("info").stdout.split())


def test_info_tells_of_a_backend_that_breaks(monkeypatch):
    from idlevit_kernels.ops.backends import REFERENCE

    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(REFERENCE, "installed", broken)
    facts = json.loads(run("info", "--json").stdout)
    assert facts["backends"]["reference"] == {"usable": False, "reasons": ["OSError: no such library"]}


def test_bench_writes_consistent_figures(tmp_path, keep_threads):
    path = tmp_path / "bench.json"
    options = ["--batch", "2", "--batch", "1", "--keep-ratio", "0.7", "--threads", "1", "--json", str(path)]
    text = run("bench", *SMALL, *options).stdout
    facts = json.loads(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]  # no temporary file is left
    assert facts["complete"] and "PARTIAL" not in text
    assert facts["input_size"] == [3, 64, 64]
    assert facts["device"] == "cpu" and facts["device_name"] and facts["environment"]["threads"] == 1
    assert facts["command"].startswith("idlevit ") and datetime.datetime.fromisoformat(facts["date"]).tzinfo

    rows = facts["models"]
    assert [(row["batch"], row["keep_ratio"]) for row in rows] == [(2, None), (2, 0.7), (1, None), (1, 0.7)]
    dense = {row["batch"]: row for row in rows if row["keep_ratio"] is None}
    for row in rows:
        floor = dense[row["batch"]]
        assert row["samples"] >= 3
        assert row["p20"] <= row["images_per_second"] <= row["p80"]
        assert row["speedup"] == pytest.approx(row["images_per_second"] / floor["images_per_second"])
        assert row["speedup_compiled"] is None
        assert row["mac_bound"] == pytest.approx(floor["macs"] / row["macs"])
        assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["mac_bound"])
        assert f"{row['images_per_second']:.1f}" in text or row["images_per_second"] >= 1000

    # 4 x 4 patches: K = int(16 * 0.7^stage)
    assert [(row["batch"], row["num_keep"]) for row in facts["blocks"]] == [(b, k) for b in (2, 1) for k in (11, 7, 5)]
    for row in facts["blocks"]:
        assert (row["num_tokens"], row["num_prefix_tokens"]) == (17, 1)
        assert row["overhead"] == pytest.approx(row["idle"]["median"] / row["dense"]["median"])
        assert row["idle"]["p20"] <= row["idle"]["median"] <= row["idle"]["p80"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "deit_smal"], "deit_small_patch16_224"),
        (["--model", "deit_smoll_patch16_224"], "deit_small_patch16_224"),
        (["--model", "resnet18"], "timm VisionTransformer"),
        (["--model", "resnet18", "--image-size", "64"], "img_size"),
        (["--keep-ratio", "0"], "(0, 1]"),
        (["--keep-ratio", "1.5"], "(0, 1]"),
        (["--batch", "0"], "at least 1"),
        (["--image-size", "8"], "(3, 8, 8)"),
        (["--image-size", "0"], "at least 1"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--device", "tpu"], "cpu, cuda or cuda:<index>"),
        (["--device", "cuda:99"], "one that there is"),
        (["--threads", "0"], "at least 1"),
        (["--seconds", "0"], "more than 0"),
        (["--json", "."], "directory"),
        (["--json", "missing/bench.json"], "missing/bench.json"),
    ],
)
def test_bench_refuses_bad_input_in_one_line(options, expected):
    result = run("bench", *options, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("idlevit: ")
    assert expected in line and (options[-1] in line or "resnet" in line)


@pytest.mark.parametrize("command", ["bench", "tune", "export", "train", "eval", "visualize"])
@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_a_defect_of_the_package_shows_its_traceback(command, kind, monkeypatch, tmp_path):
    def defect(*args, **kwargs):
        raise kind("unsupported operand type(s)")

    monkeypatch.chdir(tmp_path)
    for module, name in (
        (benchmark, "create_model"), (tune, "create_model"), (shared, "create_model"), (task, "recipe_for"),
        (evaluate, "evaluate_run"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, defect)
    given = {"tune": ["--target-speedup", "1.5"], "export": ["idle.onnx"], "visualize": ["image.png"]}
    result = CliRunner().invoke(app, [command, *given.get(command, [])])
    assert type(result.exception) is kind and result.stderr == ""  # Python prints the traceback


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "--schedule", "{file}"], "schedule must be a JSON file"),
        (["bench", "--schedule", "missing.json"], "missing.json"),
        (["tune"], "exactly one of --target-ms"),
        (["tune", "--target-speedup", "0"], "above 0"),
        (["export", "idle.pt"], ".onnx"),
        (["export", "missing/idle.onnx"], "a folder that exists"),
        (["export", "idle.onnx", "--weights", "{file}"], "no checkpoint"),
        (["export", "idle.onnx", "--weights", "missing.pth"], "missing.pth"),
        (["train", "--data", "missing"], "a folder that exists"),
        (["train", "--keep-ratio", "2"], "(0, 1]"),
        (["eval", "missing"], "missing"),
        (["visualize", "{file}", "-o", "idling.txt"], ".png, .svg, .pdf"),
        (["visualize", "{file}"], "{file}"),
        (["visualize", "missing.jpg"], "missing.jpg"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("neither JSON, nor a checkpoint, nor an image")
    small = ["--model", "test_vit"] if arguments[0] in ("export", "visualize", "tune") else []
    result = run(*(a.format(file=file) for a in arguments), *small, code=2)
    line = result.stderr.splitlines()[-1]  # below the progress bar, if there was one
    assert line.startswith("idlevit: ") and expected.format(file=file) in line


def test_bench_interrupted_marks_its_figures_as_partial(tmp_path, monkeypatch):
    def interrupted(*args):
        raise timing.Interrupted(timing.alternate(*args))

    monkeypatch.setattr(benchmark, "alternate", interrupted)
    path = tmp_path / "bench.json"
    result = run("bench", *SMALL, "--batch", "1", "--batch", "2", "--keep-ratio", "0.5", "--json", str(path), code=130)
    assert "PARTIAL" in result.stdout
    facts = json.loads(path.read_text())
    assert facts["complete"] is False
    assert [(row["batch"], row["keep_ratio"]) for row in facts["models"]] == [(1, None), (1, 0.5)]
    assert facts["blocks"] == []


def test_alternate_gives_what_it_has_when_interrupted():
    count = 0

    def call():
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    with pytest.raises(timing.Interrupted) as raised:
        timing.alternate({"a": call, "b": lambda: time.sleep(1e-3)}, 60)
    assert set(raised.value.timings) == {"a", "b"}


def test_alternate_samples_all_calls_alike():
    seconds = {"short": 1e-3, "long": 8e-3}
    progress: list[float] = []
    timings = timing.alternate(
        {name: lambda s=s: time.sleep(s) for name, s in seconds.items()}, 0.3, 5, on_progress=progress.append
    )
    assert timings["short"].n == timings["long"].n >= 5
    for name, s in seconds.items():
        assert s <= timings[name].p20 <= timings[name].median <= timings[name].p80
    assert progress == sorted(progress) and 0 < progress[0] and progress[-1] <= 1


def test_bench_measures_a_schedule(tmp_path):
    schedule, path = tmp_path / "schedule.json", tmp_path / "bench.json"
    ratios = [1.0, 1.0, 1.0, 1.0, *[0.6] * 4, *[0.3] * 4]
    schedule.write_text(json.dumps({"schedule": ratios}))
    result = run("bench", *SMALL, "--batch", "1", "--schedule", str(schedule), "--json", str(path))
    assert "schedule" in result.stdout
    facts = json.loads(path.read_text())
    assert facts["schedule"] == ratios
    assert [(row["method"], row["keep_ratio"]) for row in facts["models"]] == [("dense", None), ("IdleViT", None)]
    assert facts["models"][1]["mac_bound"] > 1
    assert [(row["block"], row["num_keep"]) for row in facts["blocks"]] == [("blocks.4", 9), ("blocks.8", 4)]
    assert facts["blocks"][0]["num_tokens"] == 17
    refused = run("bench", *SMALL, "--schedule", str(schedule), "--peers", code=2)
    assert "peers must be given with a keep ratio" in refused.stderr


def test_benchmarked_models_share_their_weights():
    bench = benchmark.ModelBenchmark("deit_tiny_patch16_224", [0.5], [1], image_size=32, device="cpu")
    dense, idle = (
        dict(bench.dense.named_parameters()),
        dict(bench.idle[benchmark.Variant("IdleViT", 0.5)].named_parameters()),
    )
    assert dense.keys() == idle.keys() and all(dense[name] is idle[name] for name in dense)
