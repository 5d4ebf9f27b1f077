"""capture: a whole model as one CUDA graph. What it refuses shows anywhere; that it replays needs a GPU."""

from __future__ import annotations

import collections

import pytest
import timm
import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.capture import check_like, copy_tensors

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU")


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


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_give_what_the_model_gives(backend: str, dtype: torch.dtype) -> None:
    reasons = ik.backends.module(backend).installed()
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
        torch.testing.assert_close(f, w, rtol=0, atol=0)
    with pytest.raises(ValueError, match="example's shape"):
        captured(inputs[0][:2])


@pytest.mark.gpu
@on_gpu
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
        torch.testing.assert_close(captured(images), model(images), rtol=0, atol=0)


@pytest.mark.gpu
@on_gpu
def test_under_autocast_and_inference_mode() -> None:
    model, images = idle_vit().cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(images)  # fills autocast's cache of casted weights, which the graph must not read
        captured = ik.capture(model, images)
        wanted = model(images)
    torch.cuda.empty_cache()
    assert captured(images).dtype == torch.bfloat16
    torch.testing.assert_close(captured(images), wanted.clone(), rtol=0, atol=0)


@pytest.mark.gpu
@on_gpu
def test_a_model_that_waits_for_the_device_is_refused() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="^capture: Waits cannot be recorded as a CUDA graph"):
        ik.capture(Waits().eval(), x)
    assert torch.equal(ik.capture(Outputs().eval(), x)(x)["pair"][0], x), "a failed capture must not break the next"
