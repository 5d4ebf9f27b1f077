"""capture: a whole model as one CUDA graph. What it refuses shows anywhere; replays: gpu/test_gpu_capture.py."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.deploy import cuda_graph
from idlevit_kernels.deploy.cuda_graph import check_like, copy_tensors


def idle_vit(**kwargs) -> nn.Module:
    options = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10, **kwargs}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    return ik.apply_idle(model, schedule=[1.0, 0.5, 0.5, 0.5])


class Outputs(nn.Module):
    """Several outputs, nested, one of them the input's own memory and one no tensor."""

    def forward(self, x: Tensor) -> dict:
        return {"pair": (x, [x + 1]), "rows": x.shape[0], "none": None}


def test_what_it_refuses() -> None:
    x = torch.zeros(2, 3, 64, 64)
    with pytest.raises(TypeError, match="^capture: model must be a torch.nn.Module, got function"):
        ik.capture(lambda x: x, x)
    with pytest.raises(TypeError, match=r"^capture: example must be one input tensor, .*, got tuple"):
        ik.capture(idle_vit(), (2, 3, 64, 64))
    with pytest.raises(ValueError, match="^capture: model must be on one CUDA device .* got .*one on cpu"):
        ik.capture(idle_vit(), x)
    with pytest.raises(ValueError, match="^capture: model must be on one CUDA device .* got .*one on cpu"):
        ik.capture(Outputs().eval(), x)  # no parameter tells where it is: the example does
    with pytest.raises(ValueError, match=r"^capture: model must be on one CUDA device .*one on cpu, meta"):
        ik.capture(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")).eval(), x)


def test_training_mode_is_refused_and_named() -> None:
    x = torch.zeros(2, 3, 64, 64)
    model = idle_vit()
    model.blocks[2].attn.train()
    with pytest.raises(ValueError, match=r"^capture: model must be in evaluation mode; .*Attention 'blocks.2.attn'"):
        ik.capture(model, x)
    with pytest.raises(ValueError, match=r"^capture: model must be in evaluation mode; .*one in training mode"):
        ik.capture(model.train(), x)


def test_an_input_that_differs_is_described() -> None:
    recorded = torch.zeros(2, 3)
    check_like("capture", torch.ones(2, 3), recorded)
    with pytest.raises(
        ValueError, match=r"capture: x must be of the example's shape: float32\[2, 3\] on cpu .*\[4, 3\]"
    ):
        check_like("capture", torch.zeros(4, 3), recorded)
    with pytest.raises(ValueError, match=r"shape and dtype and device: .* got float16\[3\] on meta"):
        check_like("capture", torch.zeros(3, dtype=torch.float16, device="meta"), recorded)
    with pytest.raises(TypeError, match=r"capture: x must be a tensor like the example, .*, got list"):
        check_like("capture", [1.0], recorded)


def test_outputs_are_copied_whatever_holds_them() -> None:
    pair = collections.namedtuple("pair", "logits features")
    a, b = torch.zeros(2), torch.ones(3)
    found = copy_tensors({"pair": pair(a, [b]), "rows": 2, "none": None})
    assert type(found["pair"]) is pair and found["rows"] == 2 and found["none"] is None
    for copy, tensor in ((found["pair"].logits, a), (found["pair"].features[0], b)):
        assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("capture_ended", [False, True])
def test_a_failed_capture_is_cleaned_up(capture_ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, without a GPU; that they help shows on one."""
    done: list[str] = []

    @contextlib.contextmanager
    def graph(graph: str, **options: object) -> Iterator[None]:
        done.append(f"begin {graph}")
        yield
        if graph == "fails":
            raise RuntimeError("capture is invalid")
        done.append(f"end {graph}")

    def end_allocate(device: int, pool: str) -> None:
        done.append(f"end allocating to {pool}")
        if capture_ended:
            raise RuntimeError("not recording")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "another")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda device, pool: done.append(f"release {pool}"), raising=False
    )
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: done.append("work"))
    record = cuda_graph._record
    with pytest.raises(RuntimeError, match="capture is invalid"):
        record("fails", lambda: None, stream=None)
    release = [] if capture_ended else ["release pool"]
    assert done == ["begin fails", "end allocating to pool", *release, "begin another", "work", "end another"]
