"""bench/plot.py draws every committed result; bench/compare.py tells a difference from the spread."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from idlevit_kernels.cli import app

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(batch: int, method: str, ratio: float | None, images: float) -> dict:
    return {
        "batch": batch,
        "method": method,
        "keep_ratio": ratio,
        "compiled": False,
        "macs": 100 if ratio is None else 60,
        "images_per_second": images,
        "p20": 0.98 * images,
        "p80": 1.02 * images,
        "speedup": images / 10,
        "mac_bound": 1.0 if ratio is None else 1.67,
    }


def result() -> dict:
    rows = [row(1, "dense", None, 10.0), row(1, "IdleViT", 0.7, 15.0), row(1, "EViT", 0.7, 14.0)]
    env = {"threads": 2, "torch": "2.8.0", "commit": None}
    return {"model": "tiny", "dtype": "float32", "device_name": "a CPU", "environment": env, "models": rows}


def test_every_committed_result_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plot = load("plot")
    assert plot.main(["--folder", str(tmp_path), *map(str, (BENCH / "results").glob("*.json"))]) == 0
    written = {Path(line) for line in capsys.readouterr().out.split()}
    assert written == set(tmp_path.iterdir()) and all(path.stat().st_size > 5000 for path in written)
    drawn = {path.stem for path in written if path.suffix == ".png"}
    assert drawn == {path.stem for path in written if path.suffix == ".svg"}
    for path in (BENCH / "results").glob("*.json"):
        if "models" in json.loads(path.read_text()):
            assert f"{path.stem}-macs" in drawn


def test_methods_and_blocks_are_drawn(tmp_path: Path) -> None:
    plot = load("plot")
    assert set(plot.figures(result())) == {"macs", "methods"}
    names = ("score", "attention", "idle block", "dense block on all tokens")
    steps = [{"batch": batch, "step": name, "seconds": 1e-3} for batch in (1, 8) for name in names]
    measured = {**result(), "num_keep": 96, "num_tokens": 197, "rows": steps}
    del measured["models"]
    (figure,) = plot.figures(measured).values()
    assert [axis.get_title() for axis in figure.axes] == ["batch 1", "batch 8"]
    assert plot.figures({"something": "else"}) == {}
    assert plot.main([str(tmp_path / "missing.json")]) == 2


def test_block_steps_add_up_to_a_block(tmp_path: Path, keep_threads: None) -> None:
    path = tmp_path / "steps.json"
    assert load("block_steps").main(["--batch", "1", "--seconds", "0.1", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert [r["step"] for r in facts["rows"]][-3:] == [
        "idle block",
        "dense block on kept tokens",
        "dense block on all tokens",
    ]
    assert all(r["p20"] <= r["seconds"] <= r["p80"] for r in facts["rows"]) and facts["environment"]["torch"]


@pytest.mark.parametrize(("factor", "words"), [(1.2, "faster, +20.0%"), (0.8, "slower, -20.0%"), (1.03, "within the")])
def test_a_verdict_knows_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture, factor: float, words: str) -> None:
    old, new = result(), copy.deepcopy(result())
    for name in ("images_per_second", "p20", "p80", "speedup"):
        new["models"][1][name] *= factor
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    assert load("compare").main(list(map(str, paths))) == (factor < 0.9)
    lines = capsys.readouterr().out.splitlines()
    assert words in next(line for line in lines if "IdleViT" in line)
    assert all("within the spread" in line for line in lines if "EViT" in line.split() or "dense" in line.split()[1:2])


def test_schedules_are_compared_with_themselves_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old, new = result(), result()
    for content, ratios in ((old, [1.0, 0.5]), (new, [1.0, 0.4])):
        content["schedule"] = ratios
        content["models"] += [row(1, "IdleViT", None, 16.0), row(1, "IdleViT", 1.0, 9.0)]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for second in (old, new):
        for path, content in zip(paths, (old, second), strict=True):
            path.write_text(json.dumps(content))
        assert load("compare").main(list(map(str, paths))) == 0
        shown = capsys.readouterr().out
        assert ("schedule" in shown) == (second is old) and "0.90 (" in shown


def test_every_picture_comes_from_commands_that_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot, commands = load("plot"), []

    def run(command: list[str], check: bool) -> None:
        commands.append(command[1:])
        if "train" in command:
            output = Path(command[command.index("--output") + 1])
            output.mkdir(parents=True, exist_ok=True)
            (output / "checkpoint-000000001.pt").touch()

    monkeypatch.setattr(plot.subprocess, "run", run)
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    plot.pictures(tmp_path)
    names = [command[2] if command[0] == "-m" else Path(command[0]).name for command in commands]
    assert names == ["materials.py", "train", "train", "train", "visualize", "visualize"]
    for name, command in zip(names, commands, strict=True):
        if command[0] == "-m":
            get_command(app).commands[name].make_context(name, command[3:])


def test_comparing_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    compare = load("compare")
    for name in (path, tmp_path / "missing.json"):
        assert compare.main([str(name), str(name)]) == 2
        assert capsys.readouterr().err.startswith("compare: ")


def test_scripts_say_what_they_do() -> None:
    for name in ("plot", "compare", "block_steps"):
        with pytest.raises(SystemExit) as stopped:
            load(name).main(["--help"])
        assert stopped.value.code == 0
