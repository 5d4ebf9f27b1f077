"""Whole blocks and models on a GPU against the float64 reference: each backend, compiled, in training, on streams."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.ops import backends, testing

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU"),
    pytest.mark.usefixtures("full_precision"),
]
BACKENDS = ("triton", "cuda")
LOGITS = 1e-4  # of a model in float32


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, in use for all ops."""
    reasons = backends.named(request.param).installed()
    if reasons:
        pytest.skip("; ".join(reasons))
    with ik.use_backend(request.param):
        yield request.param


def scores_of(block: Block, x: Tensor) -> Tensor:
    """The paper's: the head-mean of the raw attention logits of the class token [B, N]."""
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    return (q[:, :1] * k[:, 1:]).sum(-1) / block.attn.num_heads


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("C", "H", "T", "num_keep"), [(64, 2, 17, 5), (384, 6, 197, 137), (48, 3, 50, 49)])
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_block(C: int, H: int, T: int, num_keep: int, dtype: torch.dtype, inplace: bool, backend: str) -> None:
    """The tokens it chose are those of the highest scores, and come out as of a dense block on them alone."""
    block = Block(C, H, qkv_bias=True, init_values=0.5).eval().to(DEVICE, dtype)
    exact = copy.deepcopy(block).cpu().double()
    x = torch.randn(3, T, C).to(DEVICE, dtype)
    before = x.cpu().clone()
    found, indices = ik.idle_block(x, block, num_keep, inplace=inplace, return_indices=True)
    assert (found.data_ptr() == x.data_ptr()) == inplace
    found, indices = found.cpu(), indices.cpu()

    scores = scores_of(exact, before.double())
    assert (indices[:, 0] == 0).all() and (indices.diff() > 0).all() and indices.shape == (3, 1 + num_keep)
    kept = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, indices[:, 1:] - 1, True)
    lowest, highest = scores.masked_fill(~kept, torch.inf).amin(1), scores.masked_fill(kept, -torch.inf).amax(1)
    limit = testing.TOLERANCES["cls_direction", dtype] * scores.abs().amax(1)
    assert (lowest >= highest - limit).all(), "a token with a higher score idles"

    rows = indices.unsqueeze(-1).expand(-1, -1, C)
    wanted = before.double().scatter(1, rows, exact(before.double().gather(1, rows)))
    # Two branches, each of a norm and products, and two sums.
    assert testing.error(found, wanted) <= 2 * testing.TOLERANCES["cls_direction", dtype]
    idle = ~torch.zeros(before.shape, dtype=torch.bool).scatter(1, rows, True)
    assert torch.equal(found[idle], before[idle])


def tiny(**kwargs: Any) -> nn.Module:
    options = {"img_size": 64, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 10, **kwargs}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **options)
    with torch.no_grad():
        for p in model.parameters():  # at their start many are zero, and tokens score alike
            p.add_(torch.randn_like(p), alpha=0.05)
    return ik.apply_idle(model, schedule=[1.0, 0.7, 0.5, 0.3])


KINDS = [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True, "reg_tokens": 4}, {"init_values": 0.1}]


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@torch.no_grad()
def test_model(kwargs: dict[str, Any], backend: str) -> None:
    model = tiny(**kwargs).eval()
    images = torch.randn(3, 3, 64, 64)
    with ik.use_backend("reference"):
        wanted = copy.deepcopy(model).double()(images.double())
    for dtype in (torch.float32, torch.float64):
        found = copy.deepcopy(model).to(DEVICE, dtype)(images.to(DEVICE, dtype))
        assert testing.error(found, wanted) <= LOGITS


@torch.no_grad()
def test_deit_small(backend: str) -> None:
    """At the size that people use; random weights hardly tell the tokens of random images apart, so these differ."""
    model = tiny(img_size=224, embed_dim=384, num_heads=6).eval()
    images = torch.randn(2, 3, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3) + torch.randn(2, 3, 224, 224)
    with ik.use_backend("reference"):
        wanted = copy.deepcopy(model).double()(images.double())
    assert testing.error(model.to(DEVICE)(images.to(DEVICE)), wanted) <= LOGITS


def loss_of(out: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.logits, labels) + 20 * out.token_cut.mean()


def check_gradients(found: nn.Module, wanted: nn.Module) -> None:
    for (name, p), (_, w) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert (p.grad is None) == (w.grad is None), name
        if w.grad is not None:
            error = float((p.grad.cpu().double() - w.grad).abs().max() / w.grad.abs().max().clamp(min=1e-3))
            assert error <= 10 * LOGITS, f"{name}: {error:.1e}"


def test_training(backend: str) -> None:
    """Logits, the token cut loss of every layer and every gradient of ``IdleViTForTraining``."""
    exact = ik.IdleViTForTraining(tiny()).train().double()
    wrapped = copy.deepcopy(exact).to(DEVICE, torch.float32)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    with ik.use_backend("reference"):
        wanted = exact(images.double())
        loss_of(wanted, labels).backward()
    found = wrapped(images.to(DEVICE))
    loss_of(found, labels.to(DEVICE)).backward()
    assert testing.error(found.logits, wanted.logits) <= LOGITS
    assert testing.error(found.token_cut, wanted.token_cut) <= LOGITS
    assert all(torch.equal(f.cpu(), w) for f, w in zip(found.indices, wanted.indices, strict=True))
    check_gradients(wrapped, exact)


def test_training_under_autocast(backend: str) -> None:
    """Against the reference backend on the same GPU in the same types; half types decide near ties either way, so there
    are none: every token is kept."""
    wrapped = ik.IdleViTForTraining(ik.apply_idle(ik.remove_idle(tiny()), schedule=[1.0, 0.99, 0.99, 0.99])).train()
    wrapped, images, labels = wrapped.to(DEVICE), torch.randn(4, 3, 64, 64, device=DEVICE), torch.arange(4).to(DEVICE)
    losses = []
    for name in ("reference", backend):
        wrapped.zero_grad()
        with ik.use_backend(name), torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(wrapped(images), labels)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in wrapped.parameters())
        losses.append(loss.detach())
    assert testing.error(*losses) <= testing.TOLERANCES["cls_direction", torch.bfloat16]


def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    model = tiny().eval().to(DEVICE)
    images = torch.randn(3, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(images)
        assert testing.error(found, model(images)) <= LOGITS


def test_compiled_training(backend: str) -> None:
    torch._dynamo.reset()
    eager = ik.IdleViTForTraining(tiny()).train()
    compiled = copy.deepcopy(eager).to(DEVICE)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    exact = copy.deepcopy(eager).double()
    with ik.use_backend("reference"):
        loss_of(exact(images.double()), labels).backward()
    out = torch.compile(compiled)(images.to(DEVICE))
    loss_of(out, labels.to(DEVICE)).backward()
    check_gradients(compiled, exact)


@torch.no_grad()
def test_two_streams(backend: str) -> None:
    """Both at work at a time, each on its own images: nothing is shared that should not be."""
    model = tiny().eval().to(DEVICE)
    images = [torch.randn(8, 3, 64, 64, device=DEVICE) for _ in range(2)]
    wanted = [model(x) for x in images]
    streams = [torch.cuda.Stream() for _ in images]
    found: list[list[Tensor]] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # until both have work waiting
    for _ in range(10):
        for stream, x, results in zip(streams, images, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(model(x))
    torch.cuda.synchronize()
    for results, w in zip(found, wanted, strict=True):
        for f in results:
            assert testing.error(f, w) <= LOGITS
