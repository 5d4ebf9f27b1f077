"""IdleViTForTraining in every setting that people train in: gradients equal those of the plain eager run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import idlevit_kernels as ik
from idlevit_kernels.block.parts import find_parts
from idlevit_kernels.ops.backends import token_cut_loss as tiled

SMALL = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
CRITERION = ik.IdleViTLoss(nn.CrossEntropyLoss())


def make(name: str = "vit_tiny_patch16_224", cut: str = "both", **kwargs: Any) -> ik.IdleViTForTraining:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | kwargs))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return ik.IdleViTForTraining(ik.apply_idle(model, keep_ratio=0.6), cut=cut).train()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def dense_teacher() -> ik.IdleViTForTraining:
    torch.manual_seed(9)
    return ik.IdleViTForTraining(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()


def loss_of(wrapped: nn.Module, x: Tensor) -> Tensor:
    targets = torch.arange(len(x)) % 7
    with torch.no_grad():
        teacher = dense_teacher().to(x.dtype)(x)
    return CRITERION(wrapped(x), targets, teacher)[0]


def gradients(wrapped: nn.Module, x: Tensor) -> dict[str, Tensor]:
    wrapped.zero_grad()
    torch.manual_seed(3)
    loss_of(wrapped, x).backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        error = float((found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def fresh_compiler(one_thread: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cut", ["both", "none"])
def test_output_agrees_with_the_model(one_thread: None, cut: str) -> None:
    wrapped, x = make(cut=cut), images()
    out = wrapped(x)
    torch.testing.assert_close(out.logits, wrapped.model(x))
    torch.testing.assert_close(out.features, wrapped.model.forward_features(x)[:, 0])
    layers = ik.idle_blocks(wrapped.model)
    assert out.token_cut.shape == (len(layers),) and out.token_cut.dtype is torch.float32
    assert [tuple(i.shape) for i in out.indices] == [(4, 1 + int(b.keep_ratio * 16)) for b in layers.values()]
    assert bool((out.token_cut > 0).all()) == (cut == "both")
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    assert list(wrapped.model.state_dict()) == list(model.state_dict())


def test_token_cut_is_that_of_the_op(one_thread: None) -> None:
    """Of the layer's own queries, keys and selection."""
    wrapped, x = make(), images()
    inputs = {}
    for name, block in ik.idle_blocks(wrapped.model).items():
        block.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    out = wrapped(x)
    for i, (name, block) in enumerate(ik.idle_blocks(wrapped.model).items()):
        q, k, _ = block.attn.qkv(block.norm1(inputs[name])).chunk(3, dim=-1)
        wanted = ik.token_cut_loss(q, k, out.indices[i], block.attn.scale / block.attn.num_heads)
        torch.testing.assert_close(out.token_cut[i], wanted)
        _, indices = ik.idle_block(inputs[name], block, out.indices[i].shape[1] - 1, return_indices=True)
        assert torch.equal(indices, out.indices[i])


class Ops(TorchDispatchMode):
    """Names and first output shapes of all ops that run, and the most elements that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out


def test_without_cut_loss_nothing_of_it_runs(one_thread: None) -> None:
    ran = {}
    for cut in ("none", "both"):
        wrapped = make(cut=cut)
        criterion = ik.IdleViTLoss(nn.CrossEntropyLoss(), cut_weight=0 if cut == "none" else 20, distill_weight=0)
        with Ops() as ops:
            total, parts = criterion(wrapped(images()), torch.arange(4))
            total.backward()
        ran[cut] = [name for name in ops.names if "cut" in name]
        assert ("token_cut" in parts) == (cut == "both")
    assert ran["none"] == []
    assert set(ran["both"]) == {"idlevit.token_cut_loss.default", "idlevit.token_cut_loss_backward.default"}


def test_cut_loss_holds_a_tile_and_saves_rows() -> None:
    B, T, C = 2, 1800, 8
    q, k = (torch.randn(B, T, C, requires_grad=True) for _ in range(2))
    indices = ik.select_tokens(torch.randn(B, T), 900)
    arguments = (indices, 0.3, 1, "both")
    with torch.no_grad(), Ops() as ops:
        _, lse, share = tiled.token_cut_loss(q, k, *arguments)
        tiled.token_cut_loss_backward(torch.tensor(1.0), q, k, indices, lse, share, *arguments[1:])
    assert ops.largest <= tiled._TILE_ELEMENTS < B * T * T
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ik.token_cut_loss(q, k, *arguments)
    assert sorted(t.numel() for t in saved) == sorted([B * T * C, B * T * C, B * 901, B * T, B * T])


@pytest.mark.parametrize("kwargs", [{}, {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}], ids=str)
def test_activation_checkpointing(one_thread: None, kwargs: dict[str, Any]) -> None:
    wrapped, x = make(**kwargs).double(), images().double()
    wanted = gradients(wrapped, x)
    wrapped.model.set_grad_checkpointing()
    calls = []
    wrapped.model.blocks[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert_same(gradients(wrapped, x), wanted, 1e-12)
    assert len(calls) == 2, "the block was not computed again"


def test_hooked_parts_run_as_modules(one_thread: None) -> None:
    """A hook on the projection keeps the fused path off: the same loss and gradients."""
    wrapped, x = make().double(), images().double()
    wanted = gradients(wrapped, x)
    widths = []
    for block in wrapped.model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, args, out: widths.append(out.shape[-1]))
        block.mlp.fc2.register_forward_hook(lambda *_: None)
    assert_same(gradients(wrapped, x), wanted, 1e-12)
    assert set(widths) == {3 * 48}


def test_second_gradients_through_the_mlp(one_thread: None) -> None:
    block = make().double().model.blocks[0]
    x = torch.randn(1, 3, 48, dtype=torch.float64, requires_grad=True)
    mlp = find_parts(block).mlp
    assert torch.autograd.gradcheck(mlp, x)
    assert torch.autograd.gradgradcheck(mlp, x)


def test_autocast(one_thread: None) -> None:
    wrapped, x = make(), images()
    wanted = gradients(wrapped, x)
    indices = wrapped(x).indices
    wrapped.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = wrapped(x)
        with torch.no_grad():
            teacher = dense_teacher()(x)
        total, _ = CRITERION(out, torch.arange(4), teacher)
    assert out.token_cut.dtype is torch.float32 and total.dtype is torch.float32
    total.backward()
    if all(torch.equal(a, b) for a, b in zip(out.indices, indices, strict=True)):  # else another selection is trained
        for name, p in wrapped.named_parameters():
            assert p.grad.dtype is torch.float32
            error = float((p.grad - wanted[name]).norm() / wanted[name].norm())
            assert error <= 0.1, f"{name}: {error:.1e}"
    assert all(p.grad.isfinite().all() for p in wrapped.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile(fresh_compiler: None, checkpointing: bool, backend: str) -> None:
    wrapped, x = make(depth=2), images()
    wanted = gradients(wrapped, x)
    wrapped.model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(wrapped, fullgraph=True, backend=backend)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled, x).items()}
    assert_same(found, wanted, 1e-4)


def test_copies(one_thread: None) -> None:
    """An average of the weights copies the wrapper; a process group sends it."""
    wrapped, x = make().eval(), images()
    wanted = wrapped(x)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(wrapped(x).logits, wanted.logits)
        assert not torch.equal(other(x).logits, wanted.logits)


def test_distilled(one_thread: None) -> None:
    wrapped, x = make("deit_tiny_distilled_patch16_224"), images()
    averaged = wrapped(x).logits
    wrapped.model.set_distilled_training()
    heads = wrapped(x).logits
    torch.testing.assert_close((heads[0] + heads[1]) / 2, averaged)
    teacher = ik.IdleViTForTraining(timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)).eval()
    with torch.no_grad():
        taught = teacher(x)
    CRITERION(wrapped(x), torch.arange(4), taught)[0].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in wrapped.named_parameters() if "head" in name)


def _process(rank: int, store: str) -> None:
    """One of two processes: gradients of half the batch, averaged, equal those of the whole batch."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = images().double()
    with torch.no_grad():
        teacher = dense_teacher().double()(x)
        half = ik.IdleViTOutput(teacher.logits[rank::2], teacher.features[rank::2], teacher.token_cut, ())
    try:
        for form in ("ddp", "fsdp2", "fsdp2, checkpointing", "ddp, checkpointing"):
            wrapped = make().double()
            wanted = gradients(wrapped, x)
            wrapped.model.set_grad_checkpointing("checkpointing" in form)
            if "ddp" in form:
                parallel: nn.Module = DistributedDataParallel(wrapped)
            else:
                for block in wrapped.model.blocks:
                    fully_shard(block)
                parallel = fully_shard(wrapped)
            for _ in range(2):  # the second step finds the buckets and the schedule of the first
                parallel.zero_grad()
                CRITERION(parallel(x[rank::2]), torch.arange(4)[rank::2], half)[0].backward()
            grads = {name.removeprefix("module."): p.grad for name, p in parallel.named_parameters()}
            assert any(isinstance(grad, DTensor) for grad in grads.values()) == ("fsdp2" in form)
            found = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
            assert_same(found, wanted, 1e-10)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"),), nprocs=2)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"IdleViTForTraining: model must be a torch.nn.Module, got int 3"):
        ik.IdleViTForTraining(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"IdleViTForTraining: model must be one of: timm VisionTransformer"):
        ik.IdleViTForTraining(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a model with its classifier, not features_only"):
        ik.IdleViTForTraining(timm.create_model("vit_tiny_patch16_224", features_only=True, **SMALL))
    with pytest.raises(ValueError, match=r"IdleViTForTraining: cut must be one of \['both', .*got 'all'"):
        make(cut="all")
    block = make().model.blocks[2]
    with pytest.raises(ValueError, match=r"IdleBlock: return_cut must be one of \['both', .*got 'all'"):
        block(torch.randn(1, 17, 48), return_cut="all")
    with pytest.raises(TypeError, match="idle_block: cut= was replaced in version 0.2.0: use return_cut='both'"):
        ik.idle_block(torch.randn(1, 17, 48), block, 4, cut="both")
