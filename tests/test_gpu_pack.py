"""bench/gpu_pack.py: what it prepares is used only where it fits. Compiling for another GPU is shown on one kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import gpu_pack  # noqa: E402


def test_what_was_packed_from_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "_C.of.another.so").write_text("")
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(gpu_pack, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_pack, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(gpu_pack, "gpu_arch", lambda: None)
    gpu_pack.use(smoke=True)
    assert "nothing packed" in capfd.readouterr().out

    def use(**keys: str) -> str:
        (tmp_path / "packed.json").write_text(json.dumps({"arch": "90", **keys}))
        gpu_pack.use(smoke=True)
        return capfd.readouterr().out

    text = use(extension="other", triton="other")
    assert "no packed extension" in text and "absent or of another wheel or source" in text
    assert not list((tmp_path / "package").iterdir())
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "kernel").write_text("")
    shutil.make_archive(str(tmp_path / "triton"), "xztar", tmp_path, "triton")
    shutil.rmtree(tmp_path / "triton")
    text = use(extension=gpu_pack.extension_key("90"), triton=gpu_pack.triton_key("90"))
    assert "the packed extension" in text and "Triton cache is good" in text
    assert (tmp_path / "triton" / "kernel").exists()
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["_C.of.another.so"]


FILL = """
import os, sys
import gpu_pack, gpu_steps
from idlevit_kernels.ops import testing
cache = gpu_steps.TritonCache()
with gpu_pack.compiling("90"):
    arguments = testing.make_arguments("gather_tokens", testing.Case(2, 9, 8, 3))
    (found,) = testing.run("gather_tokens", arguments, "auto")
    (wanted,) = testing.expected("gather_tokens", arguments)
    assert (found == wanted).all()
print(cache.counts())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton needs Linux")
def test_kernels_are_compiled_once_for_another_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")

    def fill(**variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", FILL], capture_output=True, text=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"} | variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert fill(TRITON_STORE_BINARY_ONLY="1") == "{'hits': 0, 'misses': 1}"
    assert list(tmp_path.rglob("*.cubin")) and not list(tmp_path.rglob("*.ptx"))
    assert fill() == "{'hits': 1, 'misses': 0}", "the GPU machine does not set that variable"
