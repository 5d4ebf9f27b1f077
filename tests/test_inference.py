"""The plan that computes timm's own block in inference: the same results as ``block.py``, and never a stale one."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import LayerNormFp32
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import idlevit_kernels as ik
from idlevit_kernels import inference, ops
from idlevit_kernels.backends import module
from idlevit_kernels.complexity import register_flop_formulas

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

C, HEADS = 48, 3


def make_block(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return Block(C, HEADS, qkv_bias=True, **kwargs).eval()


def general(x: Tensor, block: nn.Module, num_keep: int, **kwargs: Any) -> Any:
    """The call as ``block.py`` computes it: recording gradients, it asks for no plan."""
    with torch.enable_grad():
        out, indices = ik.idle_block(x, block, num_keep, return_indices=True, **kwargs)
    return out.detach(), indices


def planned(block: nn.Module) -> bool:
    return block in inference._plans


@pytest.mark.parametrize("B", [0, 1, 4])
@pytest.mark.parametrize("num_keep", [1, 17, 30])
@pytest.mark.parametrize(
    "kwargs", [{}, {"init_values": 0.3}, {"drop_path": 0.2, "proj_drop": 0.1}, {"proj_bias": False}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_general(B: int, num_keep: int, kwargs: dict, dtype: torch.dtype) -> None:
    block, x = make_block(**kwargs).to(dtype), torch.randn(B, 31, C, dtype=dtype)
    wanted, wanted_indices = general(x, block, num_keep)
    before = x.clone()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            out, indices = ik.idle_block(x, block, num_keep, return_indices=True)
            assert planned(block) and torch.equal(indices, wanted_indices)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(x, before)
            written = x.clone()
            version = None if written.is_inference() else written._version
            assert ik.idle_block(written, block, num_keep, inplace=True) is written
            assert version is None or written._version > version
            torch.testing.assert_close(written, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [0, 1, 3, 8, 13])
@pytest.mark.parametrize(("channels", "tokens"), [(37, 11), (192, 50)])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_equals_three(
    dtype: torch.dtype, B: int, channels: int, tokens: int, parameters: bool, threads: int
) -> None:
    """Bit for bit: the same code runs on the same numbers."""
    cpu: Any = module("cpu")
    x = torch.randn(B, tokens + 2, channels, dtype=dtype)[:, 1:-1]
    norm = (torch.randn(channels), torch.randn(channels), 1e-6) if parameters else (None, None, 1e-6)
    qkv = torch.randn(3 * channels, channels, dtype=dtype), torch.randn(3 * channels, dtype=dtype)
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cpu.cls_select_gather_norm(x, tokens // 2, 1, *norm, *qkv)
        scores = cpu.token_scores(x, cpu.cls_direction(x, *norm, *qkv), *norm)
        wanted = cpu.select_gather_norm(x, scores, tokens // 2, 1, *norm)
    finally:
        torch.set_num_threads(previous)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("channels", [4096, 8192])
def test_directions_of_wide_rows(channels: int) -> None:
    """Fewer images at once: the stack of a thread holds no more."""
    cpu: Any = module("cpu")
    x, qkv = torch.randn(9, 2, channels), torch.randn(3 * 8, channels) / 64
    found = cpu.cls_direction(x, None, None, 1e-6, qkv, None)
    wanted = module("reference").cls_direction(x.double(), None, None, 1e-6, qkv.double(), None)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def double_forward(part: Any) -> None:
    forward = part.forward
    part.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another module": lambda block: setattr(block.mlp, "fc1", Scaled(block.mlp.fc1)),
    "another parameter": lambda block: setattr(block.attn.proj, "weight", nn.Parameter(block.attn.proj.weight * 2)),
    "other values": lambda block: block.norm2.weight.data.mul_(2),
    "other storage": lambda block: setattr(block.norm1.weight, "data", block.norm1.weight.data * 2),
    "another forward": lambda block: double_forward(block.attn),
    "a forward hook": lambda block: block.mlp.register_forward_hook(lambda module, args, out: 2 * out),
    "a pre-hook": lambda block: block.attn.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "LayerScale": lambda block: setattr(block, "ls1", Scaled(nn.Identity())),
    "a norm": lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(C // HEADS)),
    "another activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "double": lambda block: block.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_keep", [13, 30])
def test_change_is_seen(change: str, num_keep: int) -> None:
    block = make_block()
    x = torch.randn(2, 31, C)
    with torch.no_grad():
        first = ik.idle_block(x, block, num_keep)
        assert planned(block)
        CHANGES[change](block)
        x = x.to(block.norm1.weight.dtype)
        out, indices = ik.idle_block(x, block, num_keep, return_indices=True)
    wanted, wanted_indices = general(x, block, num_keep)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    if change != "double":
        assert not torch.allclose(out, first)


def test_conversion_makes_another_plan() -> None:
    """``to`` puts other data into the same parameters."""
    block, x = make_block(), torch.randn(2, 31, C)
    with torch.no_grad():
        ik.idle_block(x, block, 13)
        ik.idle_block(x.double(), block.double(), 13)
        assert inference._plans[block].dtype is torch.float64
        with pytest.raises(TypeError, match="idle_block: x must be of the block's dtype"):
            ik.idle_block(x, block, 13)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("scorer", ["cls", "mean"])
@pytest.mark.parametrize("num_keep", [13, 30])
def test_hooks_on_dropouts_are_called(grad: bool, scorer: str, num_keep: int) -> None:
    """Attention maps are taken from ``attn_drop``, with the fused attention off."""
    block, seen = make_block(), []
    block.attn.fused_attn = False
    for part in (block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.norm, block.mlp.drop2):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        with torch.set_grad_enabled(grad):
            ik.idle_block(torch.randn(2, 31, C), block, num_keep, scorer=scorer)
        assert seen.pop() and not seen
        handle.remove()


def test_no_dropout_is_needed() -> None:
    block, x = make_block().train(), torch.randn(2, 31, C)
    wanted = ik.idle_block(x, block, 13).detach()
    block.attn.proj_drop = block.mlp.drop1 = block.mlp.drop2 = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ik.idle_block(x, block, 13), wanted, rtol=1e-4, atol=1e-5)


def test_meta_tensors() -> None:
    with torch.no_grad():
        assert ik.idle_block(torch.randn(2, 31, C, device="meta"), make_block().to("meta"), 13).shape == (2, 31, C)


def test_without_private_names_of_pytorch() -> None:
    script = (
        "import torch; del torch._C._is_any_autocast_enabled\n"
        "import idlevit_kernels as ik; from idlevit_kernels import ops\n"
        "with torch.no_grad():\n"
        "    x = torch.rand(1, 4)\n"
        "    print(ops.direct(x), ik.select_tokens(x, 3).tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.stdout == "False [[0, 1, 2, 3]]\n", result.stderr


def test_training_mode_is_seen() -> None:
    block, x = make_block(proj_drop=0.5), torch.randn(2, 31, C)
    with torch.no_grad():
        first = ik.idle_block(x, block, 13)
        assert not torch.equal(ik.idle_block(x, block.train(), 13), first)
        assert torch.equal(ik.idle_block(x, block.eval(), 13), first)


@pytest.mark.parametrize("grad", [True, False])
def test_global_hook_is_seen(grad: bool) -> None:
    block, x, seen = make_block(), torch.randn(2, 31, C), []
    with torch.set_grad_enabled(grad):
        ik.idle_block(x, block, 13)
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
        try:
            ik.idle_block(x, block, 13)
        finally:
            handle.remove()
    assert {nn.Linear, nn.GELU} <= set(seen)


def test_block_can_be_copied_and_collected() -> None:
    block, x = make_block(), torch.randn(2, 31, C)
    with torch.no_grad():
        wanted = ik.idle_block(x, block, 13)
        again = copy.deepcopy(block)
        again.mlp.fc2.weight.mul_(2)
        assert not torch.equal(ik.idle_block(x, again, 13), wanted)
    count = len(inference._plans)
    del again
    assert len(inference._plans) < count


def test_modes_see_the_ops() -> None:
    register_flop_formulas()
    block, x = make_block(), torch.randn(2, 31, C)
    with torch.no_grad():
        ik.idle_block(x, block, 13)
        assert ops.direct(x)
        with FlopCounterMode(display=False) as counter:
            assert not ops.direct(x)
            ik.idle_block(x, block, 13)
        assert torch.ops.idlevit.cls_direction in counter.get_flop_counts()["Global"]
        with torch.profiler.profile() as profile:
            ik.idle_block(x, block, 13)
        assert "idlevit::token_scores" in {event.key for event in profile.key_averages()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not ops.direct(x)
        with torch._subclasses.FakeTensorMode() as mode:
            assert not ops.direct(mode.from_tensor(x))
        torch.vmap(lambda t: [t, pytest.fail("direct under vmap") if ops.direct(t) else None][0])(x)
    assert not ops.direct(x)


def test_norm_of_another_type() -> None:
    """timm's LayerNormFp32 may hold float32 parameters in a model of half type: that is not for ``F.layer_norm``."""
    block, x = make_block(norm_layer=LayerNormFp32).bfloat16(), torch.randn(2, 31, C).bfloat16()
    block.norm1.float()
    block.norm2.float()
    with torch.no_grad():
        out, indices = ik.idle_block(x, block, 30, return_indices=True)
    assert not planned(block)
    wanted, wanted_indices = general(x, block, 30)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
