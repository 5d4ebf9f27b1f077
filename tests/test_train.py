from __future__ import annotations

import csv
import importlib.util
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import small_trainer
from typer.testing import CliRunner

import idlevit_kernels as ik
from idlevit_kernels.cli import app
from idlevit_kernels.train import checkpoint
from idlevit_kernels.train.checkpoint import CheckpointError
from idlevit_kernels.train.engine import NonFiniteLoss, Stopped, Trainer
from idlevit_kernels.train.models import digits_vit

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")


def flat(state, prefix=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for key, value in enumerate(state) for k, v in flat(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def assert_same(a: Trainer, b: Trainer) -> None:
    """Weights, moving average, optimizer, scheduler, random states: bit for bit."""
    first, second = flat(a.state_dict()), flat(b.state_dict())
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.endswith("images_per_second"):
            same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            assert same, name


@pytest.fixture(scope="module")
def uninterrupted() -> Trainer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = small_trainer()
    trainer.fit()
    torch.set_num_threads(threads)
    return trainer


def test_training_changes_what_it_should(uninterrupted):
    start, trained = small_trainer().model.state_dict(), uninterrupted.model.state_dict()
    still = {name for name in start if torch.equal(start[name], trained[name])}
    assert still == {"cls_token", "pos_embed"}
    assert [row["epoch"] for row in uninterrupted.history] == [0, 1]
    assert set(uninterrupted.history[0]) >= {"classification", "token_cut", "logits", "features", "total", "lr", "top1"}
    groups = uninterrupted.optimizer.param_groups
    assert {group["weight_decay"] for group in groups for p in group["params"] if p.dim() < 2} == {0.0}


def test_total_is_the_weighted_sum_of_its_parts(uninterrupted):
    row = uninterrupted.history[0]
    expected = row["classification"] + 20 * row["token_cut"] + 10 * row["logits"] + 1000 * row["features"]
    assert row["total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_resumed_after_sigterm_ends_with_the_same_bits(tmp_path, uninterrupted, step):
    trainer = small_trainer(tmp_path)
    trainer.on_log = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row.step == step else None
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"stopped by SIGTERM; .*checkpoint-00000000{step}.pt") as stopped:
        trainer.fit()
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    torch.rand(7)
    np.random.rand(7)
    again = small_trainer(tmp_path)
    assert again.resume() and again.step == step
    again.fit()
    assert_same(again, uninterrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from small_run import small_trainer
trainer = small_trainer(Path({output!r}), checkpoint_steps=2)
trainer.on_log = lambda row: os.kill(os.getpid(), signal.SIGKILL) if row.step == 7 else None
trainer.fit()
"""


def test_resumed_after_kill_9_ends_with_the_same_bits(tmp_path, uninterrupted):
    script = KILLED.format(tests=str(Path(__file__).parent), output=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["checkpoint-000000006.pt", "checkpoint-000000004.pt"]
    newest = checkpoint.paths(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-1000])  # as after a crash of the machine
    again = small_trainer(tmp_path, checkpoint_steps=2)
    assert again.resume() and again.step == 4
    again.fit()
    assert_same(again, uninterrupted)


def test_a_run_of_another_recipe_is_not_continued(tmp_path, uninterrupted):
    trainer = small_trainer(tmp_path)
    trainer.load_state_dict(uninterrupted.state_dict())
    trainer.save()
    other = small_trainer(tmp_path, lr=1e-3, seed=1)
    expected = r"another recipe(.|\n)*lr: 0\.008 there, 0\.001 here\n  seed: 0 there, 1 here"
    with pytest.raises(CheckpointError, match=expected):
        other.resume()
    assert other.step == 0


def test_passes_of_a_step_give_the_losses_of_one_pass(uninterrupted):
    one, many = small_trainer(drop_path=0.0), small_trainer(drop_path=0.0, accumulate=4)
    one.fit(), many.fit()
    for a, b in zip(one.history, many.history, strict=True):
        for name in ("classification", "token_cut", "logits", "features", "total"):
            # The divergence of near-equal logits is a difference of numbers near 1: float32's epsilon is its floor.
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = small_trainer(tmp_path, mixup=0.0, cutmix=0.0, aug_repeats=1)
    order = [i for part in trainer.batches for i, _ in part]
    trainer.on_epoch = lambda history, step: trainer.data.train.images[order[0]].fill_(math.nan)
    with pytest.raises(NonFiniteLoss) as raised:
        trainer.fit()
    message = str(raised.value)
    step = int(message.split("at step ")[1].split()[0])
    assert 5 <= step <= 8 and "(epoch 1)" in message and "classification = nan" in message and "token_cut" in message
    assert "checkpoint-000000004.pt is the last good checkpoint" in message
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["checkpoint-000000004.pt"]
    weights = checkpoint.newest(tmp_path)[1]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = small_trainer(tmp_path)

    def spoil(row):
        if row.step == 8:  # after the last look at a loss
            trainer.model.head.weight.data[0, 0] = math.inf

    trainer.on_log = spoil
    expected = "weights not finite after step 8: head.weight. .*checkpoint-000000004.pt is the last good checkpoint"
    with pytest.raises(NonFiniteLoss, match=expected):
        trainer.fit()
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["checkpoint-000000004.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, caplog, uninterrupted):
    (tmp_path / ".checkpoint-000000004.pt.tmp").symlink_to("/dev/full")
    trainer = small_trainer(tmp_path)
    trainer.fit()
    assert "no checkpoint at step 4: [Errno 28] No space left on device" in caplog.text
    assert_same(trainer, uninterrupted)
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["checkpoint-000000008.pt"]

    full = tmp_path / "full"
    full.mkdir()
    (full / ".checkpoint-000000008.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):  # the end of the run would be lost
        small_trainer(full).fit()
    assert [path.name for path in checkpoint.paths(full)] == ["checkpoint-000000004.pt"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_full(uninterrupted, dtype):
    trainer = small_trainer(dtype=dtype)
    trainer.fit()
    assert trainer.scaler.is_enabled() == (dtype == "float16")
    for a, b in zip(trainer.history, uninterrupted.history, strict=True):
        assert a["classification"] == pytest.approx(b["classification"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for split, label, count in (("train", "cat", 8), ("train", "dog", 8), ("val", "cat", 3), ("val", "dog", 3)):
        (tmp_path / "data" / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{i}.png")
    return tmp_path / "data"


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def folder_run(folder, *more):
    """The paper's recipe on an image folder, cut down."""
    return [
        *("train", "--data", folder, "--model", "vit_tiny_patch16_224", "--image-size", 64, "--weights", "none"),
        *("--epochs", 1, "--batch-size", 8, "--lr", 1e-3, "--device", "cpu", "--threads", 1, *more),
    ]


def test_command_trains_on_a_folder_resumes_and_evaluates(folder, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "steps.csv").write_text("step,total\n1,0.5\n")  # of a run that was killed before its first checkpoint
    first = run(*folder_run(folder, "--output", output))
    for text in ("dense, at the start", "idle, before", "idle, trained", "moving average", "GMACs", "images/s"):
        assert text in first.stdout
    with open(output / "steps.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and float(rows[0]["token_cut"]) > 0
    assert (output / "tensorboard").exists() == (importlib.util.find_spec("tensorboard") is not None)

    assert f"{output}/checkpoint-000000002.pt" in run(*folder_run(folder, "--output", output), code=2).stderr
    assert "going on from step 2 of 2" in run(*folder_run(folder, "--output", output, "--resume", "auto")).stderr
    other = run(*folder_run(folder, "--output", output, "--resume", "auto", "--seed", 1), code=1)
    assert "another recipe" in other.stderr and "seed: 0 there, 1 here" in other.stderr

    shown = run("eval", output, "--ratio", 0.7, "--ratio", 0.5, "--device", "cpu").stdout
    assert "dense" in shown and "idle, 0.7" in shown and "idle, 0.5" in shown
    shown = run("eval", output / "checkpoint-000000002.pt", "--ema", "--device", "cpu").stdout
    assert "idle, 0.7" in shown


def test_unreadable_image_stops_the_run_with_a_checkpoint_or_is_skipped(folder):
    broken = folder / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    output = folder.parent / "run"
    options = ("--aug-repeats", 1, "--output", output)
    stopped = run(*folder_run(folder, *options), code=1)
    assert f"{broken} cannot be read" in stopped.stderr and "--on-bad-image skip" in stopped.stderr
    (path,) = checkpoint.paths(output)  # at the step before
    assert checkpoint.load(path)["step"] < 2
    went_on = run(*folder_run(folder, *options, "--resume", "auto", "--on-bad-image", "skip"))
    assert "; 1 training image could not be read" in went_on.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere", "--model", "deit_tiny_patch16_224"], "a folder that exists"),
        (["--model", "deit_tiny_patch16_224"], "digits_vit for data 'digits'"),
        (["--data", "DATA", "--model", "deit_smoll_patch16_224"], "deit_small_patch16_224"),
        (["--keep-ratio", "0"], "(0, 1]"),
        (["--epochs", "0"], "at least 1"),
        (["--weights", "pretrained"], "nobody pretrained digits_vit"),
        (["--weights", "missing.pt"], "missing.pt"),
        (["--device", "tpu"], "cpu"),
        (["--data", "DATA", "--model", "deit_tiny_patch16_224", "--random-augment", "rund"], "Unknown AA policy rund"),
        (["--resume", "auto"], "given with --output"),
        (["--resume", "missing.pt"], "given with --output"),
        (["--resume", "missing.pt", "--output", "OUTPUT"], "missing.pt"),
        (["--on-bad-image", "cry"], "stop or skip"),
        (["--output", "/proc/run"], "/proc/run"),
    ],
)
def test_command_refuses_bad_input_in_one_line(folder, tmp_path, options, expected):
    paths = {"DATA": folder, "OUTPUT": tmp_path / "run"}
    result = run("train", *(paths.get(option, option) for option in options), code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("idlevit: ") and expected in line
    assert result.stdout == ""


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Under torchrun over gloo: losses of every step and the accuracy, with mixup, cut loss and distillation."""
    torch.manual_seed(0)
    torch.save({"model": digits_vit().state_dict()}, tmp_path / "weights.pt")
    options = ["train", "--weights", "weights.pt", "--epochs", "1", "--batch-size", "192", "--mixup", "0.8"]
    options += ["--device", "cpu", "--threads", "1", "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    package = str(Path(ik.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "COLUMNS": "120"}
    tables = []
    for count in ("1", "2"):
        command = [*launch, count, "-m", "idlevit_kernels", *options, count]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines() if "," in line and "images" not in line]
        tables.append([line[:-1] for line in lines[1:]])  # without images/s
        assert all("1,198" in line for line in lines[1:])
    assert len(tables[0]) == 4 and tables[0] == tables[1]
    rows = []
    for count in ("1", "2"):
        with open(tmp_path / count / "steps.csv") as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == 6
    for one, two in zip(*rows, strict=True):
        for name in ("classification", "token_cut", "logits", "features", "total"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-5, abs=1e-7), name


def test_eval_without_a_model_is_refused():
    assert "eval: source must be a checkpoint" in run("eval", code=2).stderr


@pytest.mark.full
def test_the_default_command_ends_with_a_table_and_idling_keeps_accuracy(tmp_path):
    command = [sys.executable, "-m", "idlevit_kernels", "train", "--output", str(tmp_path)]
    environment = os.environ | {"COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    accuracy = {line.partition("  ")[0].strip(): float(line.split()[-5]) for line in done.stdout.splitlines()[4:8]}
    assert accuracy["dense, at the start"] > 90 and accuracy["idle, trained"] > accuracy["dense, at the start"] - 5
