from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from idlevit_kernels.train import checkpoint
from idlevit_kernels.train.checkpoint import CheckpointError


def state(step):
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}, "random": [checkpoint.random_state()]}


def names(directory):
    return [path.name for path in checkpoint.paths(directory)]


def test_round_trip_and_only_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, state(step), step)
    assert names(tmp_path) == ["checkpoint-000000030.pt", "checkpoint-000000002.pt"]
    assert sorted(os.listdir(tmp_path)) == sorted(names(tmp_path))  # no temporary file is left
    path, found = checkpoint.newest(tmp_path)
    assert path.name == "checkpoint-000000030.pt" and torch.equal(found["model"]["weight"], torch.full((1000,), 30.0))
    assert checkpoint.newest(tmp_path / "empty") is None


@pytest.mark.parametrize("size", [0, 1, 100, -100])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path, size, caplog):
    checkpoint.save(tmp_path, state(1), 1)
    newest = checkpoint.save(tmp_path, state(2), 2)
    newest.write_bytes(newest.read_bytes()[:size])
    path, found = checkpoint.newest(tmp_path)
    assert path.name == "checkpoint-000000001.pt" and found["step"] == 1
    assert f"{newest} is truncated, damaged or no checkpoint" in caplog.text


def test_no_readable_checkpoint_is_an_error_and_no_new_start(tmp_path):
    only = checkpoint.save(tmp_path, state(1), 1)
    only.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=rf"no checkpoint in {tmp_path} can be read:\n  {only} is truncated"):
        checkpoint.newest(tmp_path)
    assert only.read_bytes() == b"PK"


class Code:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"model": {}, "epoch": 3},
            "is not a training checkpoint .*: it holds a dict with model, epoch",
        ),
        ([1, 2], "it holds list"),
        ({"format": checkpoint.FORMAT, "args": Code()}, "is truncated, damaged or no checkpoint"),
    ],
)
def test_a_foreign_file_is_refused_and_runs_no_code(tmp_path, content, expected, capfd):
    path = tmp_path / "checkpoint-000000001.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    checkpoint.save(tmp_path, state(1), 1)
    (tmp_path / ".checkpoint-000000002.pt.tmp").symlink_to("/dev/full")  # where the next one is written first
    with pytest.raises(OSError, match=r"No space left on device \(0\.0 MiB to write, .* MiB free\)"):
        checkpoint.save(tmp_path, state(2), 2)
    assert os.listdir(tmp_path) == ["checkpoint-000000001.pt"]
    checkpoint.save(tmp_path, state(2), 2)
    assert checkpoint.newest(tmp_path)[1]["step"] == 2


def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path):
    checkpoint.save(tmp_path, state(1), 1)
    (tmp_path / ".checkpoint-000000002.pt.tmp").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[1]["step"] == 1
    checkpoint.save(tmp_path, state(2), 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000000001.pt", "checkpoint-000000002.pt"]


def test_random_states_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]

    draw()
    path = checkpoint.save(tmp_path, {"random": checkpoint.random_state()}, 1)
    expected = draw()
    draw()
    checkpoint.set_random_state(checkpoint.load(path)["random"])
    assert draw() == expected
