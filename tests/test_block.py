"""``idle_block`` and ``IdleBlock`` against a plain composition of the block's own modules."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import timm.layers
import torch
from small_models import noisy
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.block.attention import attend
from idlevit_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

C, HEADS = 48, 3
# The paths: fused kernels, reference, and float32 inference with its own linear layers.
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def raw_scores(x: Tensor, block: nn.Module, scorer: str) -> Tensor:
    """The head mean of the raw attention logits, with the queries and keys of all tokens."""
    attn = block.attn
    B, T, _ = x.shape
    q, k, _ = attn.qkv(block.norm1(x)).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    logits = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1)).mean(1)  # [B, T, T]
    return logits[:, 0] if scorer == "cls" else logits.mean(1)


def plain(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    scorer: str = "cls",
    scored_by: nn.Module | None = None,
) -> tuple:
    """The idle block as its docstring says it; another block may score."""
    with torch.no_grad():
        rng = torch.get_rng_state()
        idx = reference.select_tokens(raw_scores(x, scored_by or block, scorer), num_keep, num_prefix_tokens)
        torch.set_rng_state(rng)
    y = reference.gather_tokens(x, idx)
    y = y + block.drop_path1(block.ls1(block.attn(block.norm1(y))))
    y = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
    return reference.scatter_tokens(x, idx, y.to(x.dtype)), idx


class DoubledNorm(nn.LayerNorm):
    """A norm that the fused kernels do not know, though it looks like one that they do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


BLOCKS = {
    "plain": {},
    "bias on q, k, v": {"qkv_bias": True},
    "no bias": {"proj_bias": False},
    "LayerScale": {"init_values": 0.5},
    "DropPath": {"drop_path": 0.4, "init_values": 0.5},
    "dropout": {"proj_drop": 0.2, "attn_drop": 0.2},
    "q, k norm": {"qk_norm": True, "qkv_bias": True},
    "norms everywhere": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "torch LayerNorm": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "no affine": {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    "no norm bias": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "LayerNormFp32": {"norm_layer": timm.layers.LayerNormFp32},
    "RmsNorm": {"norm_layer": timm.layers.RmsNorm, "qk_norm": True},
    "torch RMSNorm": {"norm_layer": nn.RMSNorm, "init_values": 0.5},
    "unknown norm": {"norm_layer": DoubledNorm},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU},
    "packed SwiGLU": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "quick GELU": {"act_layer": timm.layers.get_act_layer("quick_gelu")},
    "ReLU": {"act_layer": nn.ReLU},
}
if "gated" in inspect.signature(timm.layers.Attention).parameters:  # not in the oldest timm that is supported
    BLOCKS["gated attention"] = {"gated": True}


def make_block(
    name: str = "plain", dtype: torch.dtype = torch.float64, width: int = C, heads: int = HEADS
) -> nn.Module:
    kwargs = dict(BLOCKS[name])
    gated = kwargs.pop("gated", False)
    block = Block(width, heads, **kwargs)
    if gated:  # Block has no argument for it
        block.attn = timm.layers.Attention(width, heads, gated=True)
    return noisy(block, 0.2, 0.05).to(dtype)


def tokens(B: int = 3, T: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(B, T, C, dtype=torch.float64) * 2 + 0.5).to(dtype)


@each_backend
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients(name: str, training: bool, backend: str) -> None:
    block = make_block(name).train(training)
    x = tokens().requires_grad_()
    torch.manual_seed(3)
    wanted, wanted_idx = plain(x, block, 7)
    torch.manual_seed(3)
    found, idx = ik.idle_block(x, block, 7, return_indices=True, backend=backend)
    assert torch.equal(idx, wanted_idx)
    limit = 1e-5 if name == "LayerNormFp32" else 1e-10  # it rounds to float32, the fused kernels do not
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
    leaves = [x, *block.parameters()]
    weight = torch.randn_like(wanted)
    grads = torch.autograd.grad((found * weight).sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=10 * limit)


@each_backend
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_float32(name: str, grad: bool, backend: str) -> None:
    block = make_block(name, torch.float32).eval()
    x = tokens(dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        found, idx = ik.idle_block(x, block, 7, return_indices=True, backend=backend)
        wanted, wanted_idx = plain(x, block, 7)
    assert torch.equal(idx, wanted_idx)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.requires_grad == grad


@each_backend
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("scorer", ["cls", "mean", "auto"])
@pytest.mark.parametrize("name", ["bias on q, k, v", "q, k norm", "torch RMSNorm"])
def test_prefix_tokens_and_scorers(name: str, scorer: str, num_prefix_tokens: int, backend: str) -> None:
    if scorer == "cls" and num_prefix_tokens == 0:
        with pytest.raises(ValueError, match="^idle_block: scorer must be"):
            ik.idle_block(tokens(), make_block(name), 7, 0, scorer=scorer, backend=backend)
        return
    block, x = make_block(name), tokens()
    meaning = ("cls" if num_prefix_tokens else "mean") if scorer == "auto" else scorer
    for num_keep in (1, 7, 20 - num_prefix_tokens):
        wanted, wanted_idx = plain(x, block, num_keep, num_prefix_tokens, meaning)
        found, idx = ik.idle_block(
            x, block, num_keep, num_prefix_tokens, scorer=scorer, return_indices=True, backend=backend
        )
        assert torch.equal(idx, wanted_idx)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@each_backend
@pytest.mark.parametrize("scorer", ["cls", "mean"])
@pytest.mark.parametrize("bias", [False, True])
def test_direction_ranks_as_the_logits_do(scorer: str, bias: bool, backend: str) -> None:
    """One vector an image in place of all keys is exact, not an approximation."""
    for seed in range(20):
        torch.manual_seed(seed)
        block = make_block("bias on q, k, v" if bias else "plain")
        x = tokens(4, 50)
        scores = raw_scores(x, block, scorer)
        for num_keep in (1, 20, 48):
            _, idx = ik.idle_block(x, block, num_keep, 1, scorer=scorer, return_indices=True, backend=backend)
            assert torch.equal(idx, reference.select_tokens(scores, num_keep, 1))


@pytest.mark.parametrize("name", ["LayerScale", "tanh GELU", "quick GELU", "no bias", "norms everywhere", "SwiGLU"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_float32_inference_of_a_usual_size(name: str, training: bool) -> None:
    """Large enough for the linear layers that only float32 inference on a CPU uses."""
    block = make_block(name, torch.float32, width=384, heads=6).train(training)
    x = torch.randn(4, 197, 384)
    wanted, wanted_idx = plain(x, block, 137)
    found, idx = ik.idle_block(x, block, 137, return_indices=True)
    assert torch.equal(idx, wanted_idx)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dropout_of_a_usual_size_is_drawn() -> None:
    """Without gradients too, as Monte-Carlo dropout needs it."""
    block, x = make_block("dropout", torch.float32, width=384, heads=6).train(), torch.randn(4, 197, 384)
    torch.manual_seed(3)
    wanted, _ = plain(x, block, 137)
    torch.manual_seed(3)
    torch.testing.assert_close(ik.idle_block(x, block, 137), wanted, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("name", ["LayerScale", "q, k norm", "torch RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(0, 20), (1, 2), (2, 1)], ids=str)
def test_small_shapes(shape: tuple[int, int], grad: bool, dtype: torch.dtype, name: str, backend: str) -> None:
    """No image, one image token, no prefix token and one image token."""
    block, x = make_block(name, dtype).eval(), tokens(*shape, dtype=dtype)
    prefix = 1 if shape[1] > 1 else 0
    with torch.set_grad_enabled(grad):
        found = ik.idle_block(x, block, 1, prefix, backend=backend)
        wanted, _ = plain(x, block, 1, prefix, "cls" if prefix else "mean")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if grad:
        found.sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())


@each_backend
def test_all_kept_is_the_dense_block(backend: str) -> None:
    block, x = make_block("LayerScale"), tokens()
    torch.testing.assert_close(ik.idle_block(x, block, 19, backend=backend), block(x), rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_idle_rows_and_memory(inplace: bool, dtype: torch.dtype, backend: str) -> None:
    block, x = make_block("LayerScale", dtype).eval(), tokens(dtype=dtype)
    before = x.clone()
    with torch.no_grad():
        wanted, wanted_idx = ik.idle_block(x, block, 7, return_indices=True, backend=backend)
        assert torch.equal(x, before)
        found, idx = ik.idle_block(x, block, 7, inplace=inplace, return_indices=True, backend=backend)
    assert (found is x) == inplace and torch.equal(found, wanted) and torch.equal(idx, wanted_idx)
    idle = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, idx, False)
    assert torch.equal(found[idle], before[idle])
    assert not torch.isclose(found[~idle], before[~idle]).all(-1).any()


@each_backend
@pytest.mark.parametrize("layout", ["transposed", "offset", "expanded"])
def test_layouts(layout: str, backend: str) -> None:
    block, x = make_block(), tokens()
    if layout == "transposed":
        strange = x.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "offset":
        strange = torch.cat([x, x, x], -1)[..., C : 2 * C]
    else:
        x = x[:1].repeat(3, 1, 1)
        strange = x[:1].expand(3, -1, -1)
    found = ik.idle_block(strange, block, 7, backend=backend)
    torch.testing.assert_close(found, plain(x, block, 7)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["offset", "transposed"])
def test_in_place_on_a_view(layout: str) -> None:
    block, x = make_block(), tokens()
    base = torch.full((3, C, 20) if layout == "transposed" else (3, 24, C + 4), 7.0, dtype=torch.float64)
    view = base.transpose(1, 2) if layout == "transposed" else base[:, 2:22, 2:-2]
    view.copy_(x)
    with torch.no_grad():
        ik.idle_block(view, block, 7, inplace=True)
        torch.testing.assert_close(view, plain(x, block, 7)[0])
    assert layout == "transposed" or (base == 7.0).sum() == base.numel() - x.numel()


@each_backend
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["LayerScale", "q, k norm", "torch RMSNorm", "LayerNormFp32"])
def test_autocast(name: str, training: bool, backend: str) -> None:
    block = make_block(name, torch.float32).train(training)
    x = tokens(dtype=torch.float32)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        found = ik.idle_block(x, block, 19, backend=backend)  # all kept: rounding cannot change the selection
        wanted, _ = plain(x, block, 19)
        some, idx = ik.idle_block(x, block, 7, return_indices=True, backend=backend)
    assert found.dtype == some.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=6e-2)
    idle = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, idx, False)
    assert torch.equal(some[idle], x[idle])
    if training:
        some.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LayerScale", "q, k norm", "torch RMSNorm", "LayerNormFp32"])
def test_half_modules(name: str, dtype: torch.dtype, backend: str) -> None:
    block = make_block(name, dtype).eval()
    x = tokens(dtype=dtype)
    found = ik.idle_block(x, block, 19, backend=backend)
    wanted, _ = plain(x.double(), copy.deepcopy(block).double(), 19)
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


PARTS = ("norm1", "attn", "attn.qkv", "attn.proj", "attn.attn_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1",
         "mlp.act", "mlp.fc2", "ls2", "drop_path2")  # fmt: skip
UNCALLED = {"attn.attn_drop"}  # timm's fused attention takes its probability and does not call it


@each_backend
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called_and_may_change_values(part: str, kind: str, backend: str) -> None:
    """Once, with the tokens that are computed; tokens are scored by the parameters of what is hooked."""
    block = make_block("DropPath", torch.float32).eval()
    unhooked, called = copy.deepcopy(block), []

    def change(value: Tensor) -> Tensor:
        called.append(value.shape)
        return value * 1.25 + 0.125

    module = block.get_submodule(part)
    if kind == "forward":
        module.register_forward_hook(lambda _, args, out: change(out))
    else:
        module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    x = tokens(dtype=torch.float32)
    with torch.no_grad():  # where float32 has its own linear layers
        wanted, _ = plain(x, block, 7, scored_by=unhooked)
        shapes = list(called)
        called.clear()
        found = ik.idle_block(x, block, 7, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(called) == (part not in UNCALLED)
    assert called == shapes


@pytest.mark.parametrize("part", ["norm1", "ls1", "norm2", "ls2"])
def test_backward_hooks_are_called(part: str) -> None:
    block = make_block("LayerScale")
    called = []
    block.get_submodule(part).register_full_backward_hook(lambda *_: called.append(part))
    ik.idle_block(tokens().requires_grad_(), block, 7).sum().backward()
    assert called


# Changed blocks


class LowRank(nn.Linear):
    """A Linear that computes something else, as adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.roll(1, -1).repeat(1, 1, 3)


def test_a_projection_that_is_no_plain_linear() -> None:
    block, x = make_block(), tokens()
    adapted = LowRank(C, 3 * C, dtype=torch.float64)
    block.attn.qkv = adapted
    for scorer in ("cls", "mean"):
        wanted, wanted_idx = plain(x, block, 7, 1, scorer)
        found, idx = ik.idle_block(x, block, 7, 1, scorer=scorer, return_indices=True)
        assert torch.equal(idx, wanted_idx)
        torch.testing.assert_close(found, wanted)


def test_parametrized_weights() -> None:
    block, x = make_block("bias on q, k, v"), tokens()
    nn.utils.parametrizations.weight_norm(block.attn.qkv)
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    torch.testing.assert_close(ik.idle_block(x, block, 7), plain(x, block, 7)[0])
    block.float()
    with torch.no_grad():
        x = x.float()
        torch.testing.assert_close(ik.idle_block(x, block, 7), plain(x, block, 7)[0], rtol=1e-4, atol=1e-4)


def test_weights_that_change_between_calls() -> None:
    """Nothing is cached: after an optimiser step or a load the new weights count."""
    block, x = make_block(dtype=torch.float32).eval(), tokens(dtype=torch.float32)
    with torch.no_grad():
        ik.idle_block(x, block, 7)
        for p in block.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(ik.idle_block(x, block, 7), plain(x, block, 7)[0], rtol=1e-4, atol=1e-4)
        block.load_state_dict(make_block(dtype=torch.float32).state_dict())
        torch.testing.assert_close(ik.idle_block(x, block, 7), plain(x, block, 7)[0], rtol=1e-4, atol=1e-4)


# The module


def test_module_keeps_names_and_follows_the_number_of_tokens() -> None:
    block = make_block("LayerScale")
    idle = ik.IdleBlock(block, 0.5, 2)
    assert list(idle.state_dict()) == list(block.state_dict())
    assert all(a is b for a, b in zip(idle.parameters(), block.parameters(), strict=True))
    for T in (5, 20, 33):
        x = tokens(T=T)
        assert torch.equal(idle(x), ik.idle_block(x, block, max(1, (T - 2) // 2), 2))
    assert "keep_ratio=0.5" in repr(idle) and "num_prefix_tokens=2" in repr(idle) and "scorer='cls'" in repr(idle)
    assert idle.dense_block() is block


def test_module_leaves_the_modes_of_its_parts() -> None:
    """A part that somebody froze in eval mode stays so, there and back."""
    block = make_block("dropout").train()
    block.attn.eval()
    modes = {name: m.training for name, m in block.named_modules()}
    idle = ik.IdleBlock(block, 0.5)
    assert {name: m.training for name, m in idle.named_modules()} == modes
    assert {name: m.training for name, m in idle.dense_block().named_modules()} == modes


def test_module_gives_replaced_parts_back() -> None:
    idle = ik.IdleBlock(make_block("LayerScale"), 0.5)
    idle.ls1, idle.mlp.fc1 = nn.Identity(), nn.Linear(C, 4 * C, dtype=torch.float64)
    replaced = idle.mlp.fc1
    dense = idle.dense_block()
    assert type(dense.ls1) is nn.Identity and dense.mlp.fc1 is replaced


@pytest.mark.parametrize("name", ["LayerScale", "q, k norm", "torch RMSNorm"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    idle = ik.IdleBlock(make_block(name), 0.5)
    compiled = torch.compile(idle, fullgraph=True, backend="aot_eager")
    x = tokens().requires_grad_()
    torch.testing.assert_close(compiled(x), idle(x))
    grads = torch.autograd.grad(compiled(x).pow(2).sum(), [x, *idle.parameters()])
    for a, b in zip(grads, torch.autograd.grad(idle(x).pow(2).sum(), [x, *idle.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_boolean_mask_means_the_same_to_a_softmax_that_is_called() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4).unbind(0)
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask[..., 0] = True  # every query sees a key
    wanted = attend(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask, softmax=nn.Softmax(-1)), wanted)
    torch.testing.assert_close(attend(q, k, v, mask, drop=nn.Identity()), wanted)
