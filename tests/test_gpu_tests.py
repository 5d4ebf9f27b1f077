"""The tests of tests/gpu are found where there is little but torch, Triton, timm and pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# What the extras of pyproject.toml and the package's own command line bring, and a GPU machine may lack.
ABSENT = (
    "hypothesis", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pytest_benchmark", "rich", "skimage", "sklearn",
    "tensorboard", "transformers", "typer",
)  # fmt: skip


def test_gpu_tests_lie_in_their_folder() -> None:
    marked = {path for path in TESTS.rglob("*.py") if re.search(r"pytest\.mark\.gpu\b", path.read_text())}
    assert marked - {Path(__file__)} == set((TESTS / "gpu").glob("test_*.py"))


def test_they_are_collected_with_few_packages() -> None:
    script = f"import sys, pytest; sys.modules.update(dict.fromkeys({ABSENT})); sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (TESTS / "gpu").glob("test_*.py"):
        assert f"{path.name}::" in done.stdout
