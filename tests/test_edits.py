"""Random edits of a model between calls: the idle model is the dense model with the same edits, or the plain chain.

With all tokens kept it equals the dense model; at 0.5 it equals ``plain_chain``, which calls the dense model's own
modules. IDLEVIT_EDITS sets how many sequences are drawn (100).
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

C, DEPTH, RATIO = 24, 2, 0.5


def make() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=DEPTH, embed_dim=C, num_heads=2, num_classes=3,
        init_values=0.5, drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def plain_block(x: Tensor, block: Any) -> Tensor:
    """An idle block as its docstring says it, from the modules of a dense one; scored with the real keys."""
    attn, num_keep = block.attn, int(RATIO * (x.shape[1] - 1))
    rng = torch.get_rng_state()
    with torch.no_grad():
        q, k, _ = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (attn.q_norm(q[:, :, :1]) * attn.k_norm(k)).sum((1, 3))
        indices = reference.select_tokens(scores, num_keep, 1)
    torch.set_rng_state(rng)  # a dropout that was put in is drawn once
    y = reference.gather_tokens(x, indices)
    y = y + block.drop_path1(block.ls1(attn(block.norm1(y))))
    y = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
    return reference.scatter_tokens(x, indices, y)


def plain_chain(model: Any, image: Tensor) -> Tensor:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    for block in model.blocks:
        x = plain_block(x, block)
    return model.forward_head(model.norm(x))


# Edits; each is made to the dense and to the idle model. Functions of the module, so that models can be pickled.


class Times:
    """In place of a forward: the module's class's own, times a factor."""

    def __init__(self, module: nn.Module, factor: float):
        self.module, self.factor = (module,), factor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module[0]
        return type(module).forward(module, *args, **kwargs) * self.factor


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 0.75


def see(module: nn.Module, args: Any, out: Any) -> None:
    """A hook that changes nothing."""


def patch(module: nn.Module) -> None:
    module.forward = Times(module, 1.25)  # type: ignore[method-assign]


def unpatch(module: nn.Module) -> None:
    module.__dict__.pop("forward", None)


def heads(block: Any) -> None:
    block.attn.num_heads = {2: 4, 4: 3, 3: 2}[block.attn.num_heads]
    block.attn.head_dim = C // block.attn.num_heads


def toggle(module: Any, name: str) -> None:
    setattr(module, name, not getattr(module, name))


def swap(holder: Any, name: str, make: Callable[[], nn.Module]) -> None:
    present = next(holder.parameters())
    setattr(holder, name, make().to(present.dtype).train(holder.training))


def other_weights(model: nn.Module) -> None:
    torch.manual_seed(7)
    model.load_state_dict({k: torch.randn_like(v) * 0.3 for k, v in model.state_dict().items()})


BLOCK_EDITS: dict[str, Callable[[Any], Any]] = {
    "eps of norm1": lambda b: setattr(b.norm1, "eps", b.norm1.eps * 1e4 if b.norm1.eps < 1 else 1e-6),
    "eps of norm2": lambda b: setattr(b.norm2, "eps", 0.3),
    "heads": heads,
    "scale": lambda b: setattr(b.attn, "scale", b.attn.scale * 1.5),
    "fused attention": lambda b: toggle(b.attn, "fused_attn"),
    "dropout": lambda b: setattr(b.mlp.drop2 if hasattr(b.mlp, "drop2") else b.attn.proj_drop, "p", 0.4),
    "attention dropout": lambda b: setattr(b.attn.attn_drop, "p", 0.25),
    "mode of a part": lambda b: b.attn.train(not b.attn.training),
    "mode of a dropout": lambda b: b.attn.proj_drop.train(not b.attn.proj_drop.training),
    "approximate": lambda b: setattr(b.mlp.act, "approximate", "tanh") if hasattr(b.mlp, "act") else None,
    "patch norm1": lambda b: patch(b.norm1),
    "patch attention": lambda b: patch(b.attn),
    "patch qkv": lambda b: patch(b.attn.qkv),
    "patch mlp": lambda b: patch(b.mlp),
    "patch ls1": lambda b: patch(b.ls1),
    "undo patches": lambda b: [unpatch(m) for m in b.modules() if m is not b],
    "hook norm1": lambda b: b.norm1.register_forward_hook(see),
    "hook qkv": lambda b: b.attn.qkv.register_forward_hook(see),
    "hook attention": lambda b: b.attn.register_forward_hook(see),
    "hook mlp": lambda b: b.mlp.register_forward_hook(see),
    "hook block": lambda b: b.register_forward_hook(see),
    "unhook": lambda b: [m._forward_hooks.clear() for m in b.modules()],
    "swap fc1": lambda b: swap(b.mlp, "fc1", lambda: nn.Linear(C, 4 * C)) if hasattr(b.mlp, "fc1") else None,
    "swap proj": lambda b: swap(b.attn, "proj", lambda: nn.Linear(C, C, bias=False)),
    "swap norm2": lambda b: swap(b, "norm2", lambda: nn.RMSNorm(C)),
    "norm queries": lambda b: swap(b.attn, "q_norm", lambda: nn.LayerNorm(C // b.attn.num_heads)),
    "no norm of queries": lambda b: setattr(b.attn, "q_norm", nn.Identity()),
    "wrap mlp": lambda b: setattr(b, "mlp", Wrapper(b.mlp)) if not isinstance(b.mlp, Wrapper) else None,
    "data": lambda b: setattr(b.attn.qkv.weight, "data", b.attn.qkv.weight.data * 0.75),
    "in place": lambda b: b.norm1.weight.data.add_(0.25),
    "parameter": lambda b: setattr(b.ls2, "gamma", nn.Parameter(b.ls2.gamma.detach() * 2)),
    "no bias": lambda b: setattr(b.attn.proj, "bias", None),
    "attribute": lambda b: setattr(b, "note", "mine"),
}
MODEL_EDITS: dict[str, Callable[[Any], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "float32": lambda m: m.float(),
    "float64": lambda m: m.double(),
    "weights": other_weights,
    "freeze": lambda m: m.requires_grad_(False),
}
IDLE_EDITS = ("remove and apply", "pickle", "deepcopy", "subclass")


class Own(ik.IdleBlock):
    """A user's subclass that changes nothing."""


def change_idle(model: Any, how: str) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    if how == "deepcopy":
        return copy.deepcopy(model)
    ik.remove_idle(model)
    if how == "subclass":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Own(block, 1.0)
        return model
    return ik.apply_idle(model, keep_ratio=1.0)


edit = st.one_of(
    st.tuples(st.just("block"), st.sampled_from(sorted(BLOCK_EDITS)), st.integers(0, DEPTH - 1)),
    st.tuples(st.just("model"), st.sampled_from(sorted(MODEL_EDITS)), st.just(0)),
    st.tuples(st.just("idle"), st.sampled_from(IDLE_EDITS), st.just(0)),
)


def compare(dense: Any, idle: Any, what: str) -> None:
    dtype = dense.cls_token.dtype
    limit = 1e-10 if dtype == torch.float64 else 2e-3
    image = torch.randn(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(3))
    pairs = {1.0: lambda: dense(image), RATIO: lambda: plain_chain(dense, image)}
    for ratio, wanted in pairs.items():
        ik.set_keep_ratio(idle, [ratio] * DEPTH)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(5)  # of dropouts
                expected = wanted()
                torch.manual_seed(5)
                found = idle(image)
            scale = max(1.0, float(expected.detach().abs().max()))
            error = float((found - expected).detach().abs().max()) / scale
            assert error <= limit, f"{what}: at {ratio}, gradients {grad}: off by {error:.1e}"


@settings(
    max_examples=int(os.environ.get("IDLEVIT_EDITS", 100)),
    deadline=None,
    derandomize="IDLEVIT_EDITS" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(edit, min_size=1, max_size=8))
def test_edits(edits: list[tuple[str, str, int]]) -> None:
    torch.manual_seed(0)
    dense = make()
    idle = ik.apply_idle(copy.deepcopy(dense), keep_ratio=1.0)
    compare(dense, idle, "at first")
    done = []
    for kind, name, layer in edits:
        done.append(name)
        if kind == "idle":
            idle = change_idle(idle, name)
        elif kind == "model":
            for model in (dense, idle):
                MODEL_EDITS[name](model)
        else:
            for model in (dense, idle):
                torch.manual_seed(11)  # of new modules
                BLOCK_EDITS[name](model.blocks[layer])
        compare(dense, idle, " -> ".join(done))
