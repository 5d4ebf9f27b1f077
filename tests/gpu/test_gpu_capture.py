"""capture on a GPU: replays give what the model gives, and a capture that fails harms nothing that comes after it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.ops import testing
from idlevit_kernels.ops.backends import named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU"),
]


def idle_vit(**kwargs: Any) -> nn.Module:
    options = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10, **kwargs}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    return ik.apply_idle(model, schedule=[1.0, 0.5, 0.5, 0.5])


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """As far as two products may differ: in a graph cuBLAS may choose another algorithm than in eager mode."""
    assert testing.error(found, wanted) <= testing.TOLERANCES["cls_direction", wanted.dtype]


class Outputs(nn.Module):
    """Several outputs, nested, one of them the input's own memory and one no tensor."""

    def forward(self, x: Tensor) -> dict:
        return {"pair": (x, [x + 1]), "rows": x.shape[0], "none": None}


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_give_what_the_model_gives(backend: str, dtype: torch.dtype) -> None:
    reasons = named(backend).installed()
    if reasons:
        pytest.skip("; ".join(reasons))
    with ik.use_backend(backend):
        model = idle_vit().to("cuda", dtype)
        inputs = [torch.randn(4, 3, 64, 64, device="cuda", dtype=dtype) for _ in range(3)]
        captured = ik.capture(model, inputs[0])
        with torch.no_grad():
            wanted = [model(x) for x in inputs]
    found = [captured(x) for x in inputs]  # each a tensor of its own: the later replays leave it alone
    for f, w in zip(found, wanted, strict=True):
        assert not f.requires_grad and not f.is_inference()
        assert_close(f, w)
    with pytest.raises(ValueError, match="example's shape"):
        captured(inputs[0][:2])


def test_several_outputs_and_new_weights() -> None:
    outputs = ik.capture(Outputs().eval(), torch.zeros(2, 3, device="cuda"))
    x = torch.randn(2, 3, device="cuda")
    found = outputs(x)
    outputs(torch.zeros_like(x))
    assert torch.equal(found["pair"][0], x) and torch.equal(found["pair"][1][0], x + 1) and found["rows"] == 2

    model = idle_vit().cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    captured = ik.capture(model, images)
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    with torch.no_grad():
        assert_close(captured(images), model(images))


def test_under_autocast_and_inference_mode() -> None:
    model, images = idle_vit().cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(images)  # fills autocast's cache of casted weights, which the graph must not read
        captured = ik.capture(model, images)
        wanted = model(images)
    torch.cuda.empty_cache()
    assert captured(images).dtype == torch.bfloat16
    assert_close(captured(images), wanted.clone())


# In a process of its own: what a failed capture leaves behind would fail every test after it.
FAILED_CAPTURE = """
import torch
from torch import nn
import idlevit_kernels as ik

class Waits(nn.Module):
    def forward(self, x):
        return x * x.sum().item()

class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x

x = torch.ones(3, device="cuda")
torch.manual_seed(0)
wanted = torch.rand(8, device="cuda")
earlier = ik.capture(Doubles().eval(), x)
stream = torch.cuda.current_stream()
torch.manual_seed(0)
for _ in range(2):
    try:
        ik.capture(Waits().eval(), x)
    except RuntimeError as error:
        assert str(error).startswith("capture: Waits cannot be recorded as a CUDA graph"), error
    else:
        raise AssertionError("it was recorded")
    assert torch.cuda.current_stream() == stream
assert torch.equal(torch.rand(8, device="cuda"), wanted), "the generator lost its place"
assert nn.functional.dropout(torch.ones(1000, device="cuda")).count_nonzero() < 1000
assert torch.equal(earlier(x), 2 * x), "an earlier graph"
assert torch.equal(ik.capture(Doubles().eval(), x)(x), 2 * x), "a later graph"
torch.cuda.synchronize()
print("unharmed")
"""


def test_a_failed_capture_harms_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FAILED_CAPTURE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("unharmed\n"), done.stderr
