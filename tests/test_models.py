"""``apply_idle`` and ``remove_idle`` on timm's models."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from comparison import noisy
from timm.models import vision_transformer
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import idlevit_kernels as ik
import idlevit_kernels.models.lvvit  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

# Released names at their own width and depth where that is quick, cut down where it is not.
NAMED = {
    "deit_tiny_patch16_224": {"img_size": 96},
    "deit_tiny_distilled_patch16_224": {"img_size": 96},
    "deit3_small_patch16_224": {"img_size": 96},
    "vit_small_patch16_224": {"img_size": 96},
    "vit_small_patch14_dinov2": {"img_size": 112},
    "vit_small_patch14_reg4_dinov2": {"img_size": 112},
    "vit_base_patch32_clip_224": {"depth": 4},
    "vit_base_patch16_clip_quickgelu_224": {"depth": 4, "img_size": 96},
    "vit_base_patch16_siglip_224": {"depth": 4, "img_size": 96},  # attention pooling, no class token
    "vit_base_patch16_siglip_gap_224": {"depth": 4, "img_size": 96},  # average, no class token
    "vit_medium_patch16_gap_240": {"depth": 4, "img_size": 96},
    "vit_medium_patch16_reg1_gap_256": {"depth": 4, "img_size": 96},  # a register, no class token
    "lvvit_small_patch16_224": {"depth": 4, "img_size": 96},
    "vit_giant_patch14_dinov2": {"depth": 4, "img_size": 56, "embed_dim": 192, "num_heads": 3},  # SwiGLU
}
TINY = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
VARIANTS = {
    "norms on q, k": {"qk_norm": True},
    "RMSNorm": {"norm_layer": "rmsnorm", "qkv_bias": False},
    "norms everywhere": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no head": {"num_classes": 0},
    "pre-norm, no pooling": {"pre_norm": True, "global_pool": ""},
}


def tiny(**kwargs) -> nn.Module:
    return noisy(timm.create_model("vit_tiny_patch16_224", **(TINY | kwargs)).eval())


def models() -> list:
    named = [pytest.param(name, kwargs, id=name) for name, kwargs in NAMED.items()]
    return [*named, *(pytest.param("vit_tiny_patch16_224", TINY | k, id=name) for name, k in VARIANTS.items())]


each_model = pytest.mark.parametrize("name, kwargs", models())


def image_for(model: nn.Module, B: int = 2) -> Tensor:
    return torch.randn(B, 3, *model.patch_embed.img_size)


def plain_idle(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The output of every block of an idle model, block by block, each in memory of its own."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    outputs = []
    for block in model.blocks:
        x = block(x.clone()).clone()
        outputs.append(x)
    return outputs


@each_model
@torch.no_grad()
def test_there_and_back(name: str, kwargs: dict) -> None:
    model = noisy(timm.create_model(name, **kwargs).eval())
    image = image_for(model)
    dense, state, blocks = model(image), model.state_dict(keep_vars=True), list(model.blocks)
    kept_state = {key: value.clone() for key, value in state.items()}

    assert ik.apply_idle(model, keep_ratio=1.0) is model
    torch.testing.assert_close(model(image), dense, rtol=1e-5, atol=1e-5)
    ik.remove_idle(model)

    assert ik.apply_idle(model, keep_ratio=0.5) is model
    depth = len(blocks)
    assert list(ik.idle_blocks(model)) == [f"blocks.{i}" for i in range(depth // 4, depth)]
    assert [b.keep_ratio for b in ik.idle_blocks(model).values()] == ik.idle_schedule(depth, 0.5)[depth // 4 :]
    idle = model(image)
    assert idle.shape == dense.shape and idle.isfinite().all() and not torch.allclose(idle, dense)
    assert torch.equal(model(image), idle)
    idle_state = model.state_dict(keep_vars=True)
    assert list(idle_state) == list(state) and all(idle_state[key] is state[key] for key in state)
    assert [key for key, _ in model.named_parameters()] == [
        key for key in state if isinstance(state[key], nn.Parameter)
    ]

    assert ik.remove_idle(model) is model
    assert type(model.blocks) is nn.Sequential and all(a is b for a, b in zip(model.blocks, blocks, strict=True))
    assert all(torch.equal(value, kept_state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(image), dense)


@each_model
@torch.no_grad()
def test_forward_is_block_by_block(name: str, kwargs: dict) -> None:
    """What the model does between its blocks, in place or not, changes nothing; every prefix token stays."""
    model = ik.apply_idle(noisy(timm.create_model(name, **kwargs).eval()), keep_ratio=0.5)
    image = image_for(model)
    for block in ik.idle_blocks(model).values():
        assert block.num_prefix_tokens == model.num_prefix_tokens
        assert block.scorer == ("cls" if model.has_class_token else "mean")
    torch.testing.assert_close(model.forward_features(image), model.norm(plain_idle(model, image)[-1]))


@each_model
def test_training_step(name: str, kwargs: dict) -> None:
    model = timm.create_model(name, **kwargs, drop_path_rate=0.1).train()
    image = image_for(model)

    def step() -> dict[str, bool]:
        model.zero_grad()
        out = model(image)
        sum(o.float().square().mean() for o in (out if isinstance(out, tuple) else (out,))).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return {key: p.grad is not None for key, p in model.named_parameters()}

    dense = step()
    ik.apply_idle(model, keep_ratio=0.5)
    assert step() == dense
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    changed = {key: not torch.equal(p, before[key]) for key, p in model.named_parameters()}
    assert all(changed[key] for key in ("blocks.1.attn.qkv.weight", "blocks.3.mlp.fc1.weight", "blocks.2.norm1.weight"))
    with torch.no_grad():
        step_out = ik.remove_idle(model).eval()(image)
    assert step_out.isfinite().all()


# Storage


def test_state_dict_loads_strictly_both_ways() -> None:
    image = torch.randn(2, 3, 64, 64)
    dense, idle = tiny(), ik.apply_idle(tiny(), keep_ratio=0.5)
    other = copy.deepcopy(dense)
    ik.apply_idle(other, keep_ratio=0.5)
    idle.load_state_dict(dense.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(idle(image), other(image))
    trained = ik.apply_idle(tiny(), keep_ratio=0.5).state_dict()
    dense.load_state_dict(trained, strict=True)
    assert all(torch.equal(v, trained[k]) for k, v in dense.state_dict().items())


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_file}


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_copies(copier) -> None:
    image = torch.randn(2, 3, 64, 64)
    dense_out = (model := tiny(init_values=0.5))(image)
    ik.apply_idle(model, keep_ratio=0.5)
    wanted = model(image)
    again = copier(model)
    assert torch.equal(again(image), wanted)
    assert list(ik.idle_blocks(again)) == list(ik.idle_blocks(model))
    for p in again.parameters():  # a copy is on its own
        p.mul_(1.5)
    assert torch.equal(model(image), wanted) and not torch.allclose(again(image), wanted)
    for p in again.parameters():
        p.div_(1.5)
    torch.testing.assert_close(ik.remove_idle(again)(image), dense_out, rtol=1e-4, atol=1e-4)
    assert not ik.idle_blocks(again) and torch.equal(model(image), wanted)


def test_a_whole_model_from_another_process(tmp_path) -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.save({"model": model, "image": image, "out": model(image)}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(saved['model'](saved['image']), saved['out'])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, timeout=300)


@torch.no_grad()
def test_moving_an_idle_model_moves_the_dense_one() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5).to(torch.bfloat16)
    image = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    assert model(image).dtype == torch.bfloat16
    ik.remove_idle(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model(image).isfinite().all()


def test_modes_and_flags_survive() -> None:
    model = tiny(drop_path_rate=0.2).train()
    model.blocks[2].eval()
    model.blocks[1].attn.eval()
    model.blocks[3].mlp.fc1.weight.requires_grad_(False)
    modes = {name: m.training for name, m in model.named_modules()}
    ik.apply_idle(model, keep_ratio=0.5)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not model.blocks[3].mlp.fc1.weight.requires_grad
    ik.remove_idle(model)
    assert {name: m.training for name, m in model.named_modules()} == modes
    ik.apply_idle(model, keep_ratio=0.5).eval()
    assert not any(m.training for m in ik.remove_idle(model).modules())


# How timm uses its blocks


def test_gradient_checkpointing() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5).train()
    image = torch.randn(2, 3, 64, 64)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = gradients()
    model.set_grad_checkpointing(True)
    for found, grad in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}], ids=str)
@torch.no_grad()
def test_dynamic_image_size(kwargs: dict) -> None:
    model = ik.apply_idle(tiny(dynamic_img_size=True, **kwargs), keep_ratio=0.5)
    P = model.num_prefix_tokens
    for size, ratio_kept in (((64, 64), [8, 4, 2]), ((96, 160), [30, 15, 7]), ((16, 48), [1, 1, 1])):
        image = torch.randn(2, 3, *size)
        outputs = plain_idle(model, image)
        torch.testing.assert_close(model.forward_features(image), model.norm(outputs[-1]))
        for before, after, K in zip(outputs, outputs[1:], ratio_kept, strict=False):
            changed = (before != after).any(-1)
            assert changed[:, :P].all() and (changed[:, P:].sum(1) == K).all()


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_forward_intermediates(norm: bool, kwargs: dict) -> None:
    model = ik.apply_idle(tiny(**kwargs), keep_ratio=0.5)
    image = torch.randn(2, 3, 64, 64)
    outputs = plain_idle(model, image)
    wanted = [model.norm(x) if norm else x for x in outputs]
    P = model.num_prefix_tokens
    final, found = model.forward_intermediates(image, norm=norm)
    torch.testing.assert_close(final, model.norm(outputs[-1]))
    for got, x in zip(found, wanted, strict=True):
        assert got.shape == (2, 48, 4, 4)
        torch.testing.assert_close(got, x[:, P:].transpose(1, 2).reshape(2, 48, 4, 4))
    _, found = model.forward_intermediates(image, norm=norm, output_fmt="NLC")  # views of the blocks' outputs
    for got, x in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, x[:, P:])
    (found,) = model.forward_intermediates(image, indices=[2], stop_early=True, intermediates_only=True, norm=norm)
    torch.testing.assert_close(found, wanted[2][:, P:].transpose(1, 2).reshape(2, 48, 4, 4))


@torch.no_grad()
def test_features_only() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, **(TINY | {"num_classes": 0})).eval()
    image = torch.randn(2, 3, 64, 64)
    dense = model(image)
    noisy(model)
    keys = list(model.state_dict())
    assert ik.apply_idle(model, keep_ratio=0.5) is model and list(model.state_dict()) == keys
    assert len(ik.idle_blocks(model)) == 3
    found = model(image)
    outputs = plain_idle(model.model, image)
    assert [f.shape for f in found] == [f.shape for f in dense]
    for got, i in zip(found, model.feature_info.out_indices, strict=True):
        torch.testing.assert_close(got, outputs[i][:, 1:].transpose(1, 2).reshape(2, 48, 4, 4))
    ik.remove_idle(model)
    assert not ik.idle_blocks(model)


@torch.no_grad()
def test_hooks_on_blocks_see_values_that_stay() -> None:
    """Nobody writes into an output that a hook holds, nor into an input."""
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    image = torch.randn(2, 3, 64, 64)
    wanted = model(image)
    outputs = plain_idle(model, image)
    held, copies = [], []

    def keep(_: nn.Module, args: tuple, out: Tensor) -> None:
        held.extend([args[0], out])
        copies.extend([args[0].clone(), out.clone()])

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    assert torch.equal(model(image), wanted)
    assert len(held) == 8
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    for got, x in zip(held[1::2], outputs, strict=True):
        torch.testing.assert_close(got, x)

    for handle in handles:
        handle.remove()
    model.blocks[2].register_forward_hook(lambda _, args, out: out * 0)  # a hook may also replace the output
    assert not torch.allclose(model(image), wanted)


@torch.no_grad()
def test_a_hook_on_one_block_or_within() -> None:
    """Only the middle one of several idle layers is watched."""
    for watched in ("blocks.2", "blocks.2.norm1", "blocks.2.mlp.fc1", "blocks.1.attn"):
        model = ik.apply_idle(tiny(), keep_ratio=0.5)
        image = torch.randn(2, 3, 64, 64)
        wanted, held = model(image), []
        model.get_submodule(watched).register_forward_hook(lambda _, a, out, held=held: held.append((out, out.clone())))
        torch.testing.assert_close(model(image), wanted)
        assert held and all(torch.equal(out, was) for out, was in held), watched


def test_hooks_set_before_apply_idle_stay() -> None:
    model, calls = tiny(), []
    model.blocks[2].register_forward_hook(lambda *_: calls.append("hook"))
    ik.apply_idle(model, keep_ratio=0.5)(torch.randn(1, 3, 64, 64))
    assert calls == ["hook"]
    ik.remove_idle(model)(torch.randn(1, 3, 64, 64))
    assert calls == ["hook"] * 2


@torch.no_grad()
def test_the_image_and_earlier_results_stay() -> None:
    model = ik.apply_idle(tiny(patch_size=16, global_pool=""), keep_ratio=0.5)
    image = torch.randn(2, 3, 64, 64)
    before = image.clone()
    first = model(image)
    kept = first.clone()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(first, kept) and torch.equal(image, before)


@torch.no_grad()
def test_blocks_called_by_hand() -> None:
    """Slices, single blocks and the sequence give new tensors and leave their input alone."""
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    x = torch.randn(2, 17, 48)
    before, wanted = x.clone(), x
    for block in model.blocks:
        wanted = block(wanted)
    assert torch.equal(x, before)
    torch.testing.assert_close(model.blocks(x), wanted)
    assert torch.equal(x, before)
    torch.testing.assert_close(model.blocks[2:](model.blocks[:2](x)), wanted)
    assert torch.equal(x, before)
    assert len(model.blocks) == 4 and len(list(model.blocks)) == 4
    for inner in (model.blocks[1:], model.blocks[3]):
        inner(x)
        assert torch.equal(x, before)


def test_inference_mode_and_no_grad_agree() -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        inference = model(image)
    with torch.no_grad():
        assert torch.equal(model(image), inference)
    torch.testing.assert_close(model(image), inference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("B", [0, 1])
@torch.no_grad()
def test_batch_of(B: int) -> None:
    model = tiny()
    image = torch.randn(B, 3, 64, 64)
    assert ik.apply_idle(model, keep_ratio=0.5)(image).shape == (B, 7)


@torch.no_grad()
def test_images_do_not_see_each_other() -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(5, 3, 64, 64)
    together = model(image)
    torch.testing.assert_close(together, torch.cat([model(one[None]) for one in image]), rtol=1e-4, atol=1e-4)


def test_threads_share_a_model() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    images = [torch.randn(2, 3, 64, 64) for _ in range(8)]

    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            return model(image)

    wanted = [run(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(run, images * 3), wanted * 3, strict=True):
            torch.testing.assert_close(found, want)


def test_patch_dropout_in_training() -> None:
    model = ik.apply_idle(tiny(patch_drop_rate=0.5), keep_ratio=0.5).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.blocks[3].attn.qkv.weight.grad.abs().sum() > 0


def test_attention_masks_are_refused() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    with pytest.raises(ValueError, match="^IdleBlock: (attn_mask|is_causal) must be"):
        model(torch.randn(2, 3, 64, 64), attn_mask=torch.zeros(17, 17))


@torch.no_grad()
def test_scorer_argument() -> None:
    image = torch.randn(2, 3, 64, 64)
    model = tiny()
    outputs = {scorer: (ik.apply_idle(model, keep_ratio=0.5, scorer=scorer)(image), ik.remove_idle(model))[0]
               for scorer in ("auto", "cls", "mean")}  # fmt: skip
    assert torch.equal(outputs["auto"], outputs["cls"]) and not torch.allclose(outputs["auto"], outputs["mean"])
    gap = tiny(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="^apply_idle: scorer must be 'mean' or 'auto'"):
        ik.apply_idle(gap, scorer="cls")
    assert not ik.idle_blocks(gap)


def test_schedule_argument() -> None:
    model = ik.apply_idle(tiny(), schedule=[0.5, 1.0, 1, 0.25])
    assert {name: block.keep_ratio for name, block in ik.idle_blocks(model).items()} == {
        "blocks.0": 0.5,
        "blocks.3": 0.25,
    }
    assert [b.keep_ratio for b in ik.idle_blocks(ik.apply_idle(tiny())).values()] == ik.idle_schedule(4, 0.7)[1:]
    ik.apply_idle(tiny(), schedule=(1.0, 0.5, 0.5, 0.5))


# Consecutive idle blocks work in place where nobody can see it


class Writes(TorchDispatchMode):
    """Counts the ops that write into their argument."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("idlevit.scatter_add_tokens_.")
        return func(*args, **kwargs or {})


def writes(function, *args) -> int:
    with Writes() as mode:
        function(*args)
    return mode.count


VISIBLE = {
    "plain": {},
    "RMSNorm": {"norm_layer": "rmsnorm", "init_values": 0.5},
    "norms on q, k": {"qk_norm": True},
    "mean": {"class_token": False, "global_pool": "avg", "drop_path_rate": 0.2},
}


def test_in_place_only_without_gradients() -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    assert writes(model, image) == 0
    with torch.no_grad():
        assert writes(model, image) == 3  # the dense first block made the buffer
        assert writes(lambda: [block(torch.randn(2, 17, 48)) for block in model.blocks]) == 0
        assert writes(model.forward_intermediates, image) == 0
        assert writes(ik.apply_idle(tiny(), schedule=[0.5, 1, 0.5, 1]), image) <= 1
    with torch.inference_mode():
        assert writes(model, image) == 3


@pytest.mark.parametrize("schedule", [[1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 0.3]], ids=str)
@pytest.mark.parametrize("variant", VISIBLE.values(), ids=VISIBLE)
@torch.no_grad()
def test_what_any_hook_holds_stays(variant: dict, schedule: list[float]) -> None:
    """Every module of the model in turn, its inputs and outputs, by each kind of hook."""
    model, image = ik.apply_idle(tiny(**variant), schedule=schedule), torch.randn(2, 3, 64, 64)
    wanted = model(image)
    for name, module in model.named_modules():
        held: list[tuple[Tensor, Tensor]] = []

        def keep(*values, held=held) -> None:
            tensors = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
            held.extend((t, t.clone()) for t in tensors if isinstance(t, Tensor))

        for register in (
            lambda keep=keep: module.register_forward_hook(lambda _, args, out: keep(args, out)),  # noqa: B023
            lambda keep=keep: module.register_forward_hook(lambda _, a, kw, out: keep(a, out), with_kwargs=True),  # noqa: B023
            lambda keep=keep: module.register_forward_pre_hook(lambda _, args: keep(args)),  # noqa: B023
        ):
            handle = register()
            torch.testing.assert_close(model(image), wanted, msg=name)
            handle.remove()
            assert all(torch.equal(t, was) for t, was in held), name
        assert held or "drop" in name or type(module).__name__ == "Dropout", name
    assert torch.equal(model(image), wanted)


@torch.no_grad()
def test_what_a_global_hook_holds_stays() -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    held = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda _, args, out: held.append((out, out.clone())) if isinstance(out, Tensor) else None
    )
    try:
        model(image)
    finally:
        handle.remove()
    assert held and all(torch.equal(t, was) for t, was in held)


@torch.no_grad()
def test_what_a_replaced_forward_holds_stays() -> None:
    """Attention viewers and the like overwrite ``forward`` of a block."""
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    held = []
    forward = model.blocks[2].forward

    def spy(x: Tensor, *args, **kwargs) -> Tensor:
        out = forward(x, *args, **kwargs)
        held.extend([(x, x.clone()), (out, out.clone())])
        return out

    wanted = model(image)
    model.blocks[2].forward = spy
    torch.testing.assert_close(model(image), wanted)
    assert len(held) == 2 and all(torch.equal(t, was) for t, was in held)


class Recorder(nn.Module):
    """Wraps a module and keeps what goes in and out."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.held = inner, []

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        out = self.inner(x, *args, **kwargs)
        self.held.extend([(x, x.clone()), (out, out.clone())])
        return out


@pytest.mark.parametrize("i", [0, 1, 2, 3])
@torch.no_grad()
def test_what_a_wrapped_module_holds_stays(i: int) -> None:
    image = torch.randn(2, 3, 64, 64)
    for wrap in ("block", "norm1", "norm2", "mlp", "identity"):
        model = ik.apply_idle(tiny(), keep_ratio=0.5)
        wanted = model(image)
        block = model.blocks[i]
        recorder = Recorder(block if wrap == "block" else nn.Identity() if wrap == "identity" else getattr(block, wrap))
        if wrap == "identity":
            model.blocks.insert(i, recorder)
        elif wrap == "block":
            model.blocks[i] = recorder
        else:
            setattr(block, wrap, recorder)
        torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-4)
        assert recorder.held and all(torch.equal(t, was) for t, was in recorder.held), wrap


@torch.no_grad()
def test_results_of_earlier_calls_stay() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    x = torch.randn(2, 17, 48)
    for blocks in (model.blocks, model.blocks[1:], model.blocks[2:3]):
        first = blocks(x)
        kept = first.clone()
        blocks(torch.randn(2, 17, 48))
        blocks(first)
        assert torch.equal(first, kept)


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(copier) -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    again, calls = copier(model), []
    again.blocks[2].register_forward_hook(lambda *_: calls.append("copy"))
    model(torch.randn(1, 3, 64, 64))
    assert not calls
    again(torch.randn(1, 3, 64, 64))
    ik.remove_idle(again)(torch.randn(1, 3, 64, 64))
    assert calls == ["copy"] * 2


@pytest.mark.parametrize("where", ["blocks", "blocks.0", "blocks.2"])
def test_handles_work_across_apply_and_remove(where: str) -> None:
    model, image, calls = tiny(), torch.randn(1, 3, 64, 64), []
    before = model.get_submodule(where).register_forward_hook(lambda *_: calls.append("before"))
    ik.apply_idle(model, keep_ratio=0.5)
    during = model.get_submodule(where).register_forward_hook(lambda *_: calls.append("during"))
    model(image)
    assert calls == ["before", "during"]
    before.remove()
    ik.remove_idle(model)(image)
    assert calls == ["before", "during", "during"]
    during.remove()
    model(image)
    assert len(calls) == 3


# What cannot idle

REFUSED = {
    "parallel scaling": (lambda: tiny(block_fn=ParallelScalingBlock), "ParallelScalingBlock.*in parallel"),
    "parallel things": (lambda: tiny(block_fn=ParallelThingsBlock), "ParallelThingsBlock.*in parallel"),
    "post-norm": (lambda: tiny(block_fn=ResPostBlock), "ResPostBlock.*post-norm"),
    "relative": (lambda: timm.create_model("vit_relpos_small_patch16_224", depth=2), "must be one of.*RelPos"),
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224", depth=2), "must be one of.*Beit"),
    "ResNet": (lambda: timm.create_model("resnet18"), "must be one of: timm VisionTransformer.*; got timm.*ResNet"),
    "Linear": (lambda: nn.Linear(3, 3), "must be one of.*got torch.nn.modules.linear.Linear"),
    "compiled": (lambda: torch.compile(tiny()), "OptimizedModule.*before torch.compile"),
}  # fmt: skip
if hasattr(vision_transformer, "DiffParallelScalingBlock"):  # not in the oldest timm that is supported
    REFUSED |= {
        "parallel diff": (
            lambda: tiny(block_fn=vision_transformer.DiffParallelScalingBlock),
            "DiffParallelScalingBlock.*in parallel",
        ),
        "differential attention": (
            lambda: tiny(attn_layer="diff"),
            "attention is DiffAttention.*not timm's softmax",
        ),
    }


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_refused(make, reason: str) -> None:
    model = make()
    modules = modules_of(model)
    with pytest.raises(TypeError, match=f"(?s)^apply_idle: .*{reason}"):
        ik.apply_idle(model, keep_ratio=0.5)
    assert modules_of(model) == modules


def modules_of(model: nn.Module) -> list:
    return [(name, id(m), m.training) for name, m in model.named_modules()]


def test_one_odd_block_refuses_the_model() -> None:
    model = tiny()
    model.blocks[3] = ResPostBlock(48, 3)
    modules = modules_of(model)
    with pytest.raises(TypeError, match="ResPostBlock"):
        ik.apply_idle(model, keep_ratio=0.5)
    assert modules_of(model) == modules


def test_a_subclass_of_the_model_is_taken() -> None:
    class Mine(VisionTransformer):
        pass

    model = Mine(**TINY, patch_size=16).eval()
    assert len(ik.idle_blocks(ik.apply_idle(model, keep_ratio=0.5))) == 3


# Compilation


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool, kwargs: dict) -> None:
    torch._dynamo.reset()
    model, image = ik.apply_idle(tiny(**kwargs), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        wanted = model(image)
        torch.testing.assert_close(compiled(image), wanted, rtol=1e-4, atol=1e-4)
        if grad:
            grads = torch.autograd.grad(compiled(image).square().sum(), list(model.parameters()))
            for a, b in zip(grads, torch.autograd.grad(wanted.square().sum(), list(model.parameters())), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    model = ik.apply_idle(tiny(dynamic_img_size=True, depth=2), schedule=[0.5, 0.25])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 64, 64), (3, 64, 64), (2, 96, 64)):
        image = torch.randn(shape[0], 3, *shape[1:])
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model, image = ik.apply_idle(tiny(init_values=0.5), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    wanted = model(image)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(image), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled(image), compiled(image))


@torch.no_grad()
def test_export() -> None:
    model, image = ik.apply_idle(tiny(), keep_ratio=0.5), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (image,))
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-4)
