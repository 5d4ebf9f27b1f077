"""Without oneDNN, Triton or transformers: the package is imported, a ViT idles, `idlevit info` says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# Hides libraries from the import system and from the list of what is installed, as if they never had been.
_SCRIPT = """
import importlib.machinery, importlib.metadata, json, sys

ABSENT = {absent!r}

def hidden(name):
    return name.partition(".")[0] in ABSENT

find_spec, version = importlib.machinery.PathFinder.find_spec, importlib.metadata.version

def find_others(name, path=None, target=None):
    return None if hidden(name) else find_spec(name, path, target)

def version_of_others(name):
    if hidden(name):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.machinery.PathFinder.find_spec, importlib.metadata.version = find_others, version_of_others

import torch

if "onednn" in ABSENT:
    torch.backends.mkldnn.is_available = lambda: False
if "ops of onednn" in ABSENT:  # a build without the library does not have them either
    torch.ops.mkldnn = torch._ops._OpNamespace("none")

import idlevit_kernels as ik
from idlevit_kernels.measure.info import collect
from timm.models import VisionTransformer

torch.manual_seed(0)
model = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=5).eval()
images = torch.randn(2, 3, 64, 64)
ik.apply_idle(model, keep_ratio=0.7)
with torch.inference_mode():
    logits = model(images)
    with ik.use_backend("reference"):
        expected = model(images)
trained = model.train()(images)
trained.sum().backward()
facts = collect()
print(json.dumps({{
    "loaded": sorted({{name for name in sys.modules if hidden(name)}}),
    "blocks": len(ik.idle_blocks(model)),
    "difference": float((logits - expected).abs().max()),
    "gradients": all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters()),
    "fast_paths": {{gate["name"]: [gate["available"], gate["detail"]] for gate in facts["fast_paths"]}},
    "triton": facts["backends"]["triton"],
    "libraries": facts["libraries"],
}}))
"""


def _run(*absent: str) -> dict[str, Any]:
    script = _SCRIPT.format(absent=set(absent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a fast path is off" not in done.stderr  # what is not there at all is nothing that was lost
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "absent",
    [
        ("onednn",),
        pytest.param(("onednn", "ops of onednn")),
        ("triton",),
        ("transformers",),
        ("onednn", "triton", "transformers"),
    ],
)
def test_a_vit_idles_without(absent: tuple[str, ...]) -> None:
    found = _run(*absent)
    assert found["loaded"] == []
    assert found["blocks"] == 3 and found["difference"] < 1e-5 and found["gradients"]
    fast_paths = found["fast_paths"]
    for name in ("oneDNN's linear layer", "packed weights of oneDNN"):
        if "onednn" in absent:
            assert fast_paths[name] == [False, "this build of PyTorch has no oneDNN; F.linear is called"]
    if "triton" in absent:
        assert fast_paths["Triton's compiler without a GPU"] == [False, "No module named 'triton'"]
        assert found["triton"] == {
            "usable": False,
            "reasons": ["Triton cannot be imported: No module named 'triton'"],
        }
        assert found["libraries"]["triton"]["installed"] is None
    if "transformers" in absent:
        assert fast_paths["layers of transformers"] == [False, "transformers is not installed"]
        assert found["libraries"]["transformers"]["installed"] is None
