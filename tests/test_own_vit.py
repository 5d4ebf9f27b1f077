"""A user's own Vision Transformer: the family of examples/own_vit.py, and what register_family refuses."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.block import CalledAttention
from idlevit_kernels.models import family as families


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = Path(__file__).parents[1] / "examples" / "own_vit.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks up its classes
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def family(example: ModuleType) -> Iterator[Any]:
    own = example.OwnFamily()
    ik.register_family(own)
    yield own
    for known in [f for f in families._families if f.name == own.name]:
        families.unregister_family(known)


@pytest.fixture
def model(example: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return example.OwnViT(depth=4).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_keep_ratio_1_is_dense(model: nn.Module) -> None:
    wanted, keys = model(images()), list(model.state_dict())
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(model(images()), wanted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_each_layer_computes_the_kept_tokens(model: nn.Module) -> None:
    dense, wanted = copy.deepcopy(model), model(images())
    ik.apply_idle(model, schedule=[0.5] * 4)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    idle = model(images())
    assert not torch.allclose(idle, wanted, atol=1e-3) and len(seen) == 4
    for layer, (x, out) in zip(dense.layers, seen, strict=True):
        changed = (x != out).any(2)
        assert changed.sum(1).tolist() == [1 + 32] * 2 and changed[:, 0].all()
        for image in range(2):
            kept = changed[image]
            alone = layer(x[image, kept][None])[0]
            torch.testing.assert_close(out[image, kept], alone, rtol=1e-5, atol=1e-5)
        # The kept ones are those that the class token attends to most, by the layer's own logits.
        q, k, _ = layer.attention.to_qkv(layer.before_attention(x)).chunk(3, 2)
        logits = (q[:, :1] * k).sum(2)[:, 1:]
        lowest = logits.masked_fill(~changed[:, 1:], torch.inf).amin(1)
        assert (lowest >= logits.masked_fill(changed[:, 1:], -torch.inf).amax(1) - 1e-4).all()


@torch.no_grad()
def test_remove_idle_bit_for_bit(model: nn.Module) -> None:
    wanted, layers = model(images()), list(model.layers)
    ik.apply_idle(model, keep_ratio=0.5)(images())
    assert torch.equal(ik.remove_idle(model)(images()), wanted)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True)) and type(model.layers) is nn.ModuleList


def test_gradients_and_a_saved_model(model: nn.Module) -> None:
    ik.apply_idle(model, keep_ratio=0.5)
    model(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(images()), model(images())) and len(ik.idle_blocks(again)) == 3


@torch.no_grad()
def test_compile(model: nn.Module) -> None:
    torch._dynamo.reset()
    ik.apply_idle(model, keep_ratio=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_change_of_a_part_is_noticed(model: nn.Module) -> None:
    """The parts are looked up once; what the form read through the watch may change."""
    ik.apply_idle(model, schedule=[0.5] * 4)(images())
    for layer in model.layers:
        layer.mlp = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        layer.before_attention.eps = 0.1
        layer.attention.to_qkv = nn.Linear(64, 192, bias=False)
    fresh = ik.apply_idle(copy.deepcopy(ik.remove_idle(copy.deepcopy(model))), schedule=[0.5] * 4)
    assert torch.equal(model(images()), fresh(images()))


@torch.no_grad()
def test_other_scorers_and_the_rest(model: nn.Module) -> None:
    for scorer in ("mean", "random", lambda x, block: x.norm(dim=2)):
        ik.apply_idle(model, keep_ratio=0.5, scorer=scorer)
        (first, _) = ik.selections(model, images())
        assert [layer.kept.sum() for layer in first] == [32, 16, 8]
        ik.remove_idle(model)
    macs = ik.count_macs(ik.apply_idle(model, keep_ratio=0.5), (3, 64, 64))
    assert macs.per_layer["layers.0"] > macs.per_layer["layers.1"] > macs.per_layer["layers.3"] > 0
    assert ik.idle_config(model) == {"schedule": [1.0, 0.5, 0.25, 0.125], "scorer": "cls", "select": "top"}
    with pytest.raises(TypeError, match="my ViT has no training form"):
        ik.IdleViTForTraining(model)


@torch.no_grad()
def test_training_form(example: ModuleType, model: nn.Module) -> None:
    """With embed, head and the scale of the logits, the token cut loss is there."""

    class Form(example.OwnForm):
        def parts(self, block: Any, watch: Any) -> Any:
            parts = super().parts(block, watch)
            attn = watch.value(block, "attention")
            projections = (watch.value(attn, "to_qkv"),)
            parts.attention = CalledAttention(attn, watch, watch.value(attn, "heads"), projections, 16**-0.5)
            return parts

    class Trained(example.OwnFamily):
        forms = (Form(),)

        def embed(self, place: Any, images: Tensor) -> Any:
            x = place.embed(images).flatten(2).transpose(1, 2)
            return torch.cat([place.cls.expand(len(x), -1, -1), x], 1) + place.position, [{} for _ in place.layers]

        def head(self, place: Any, x: Tensor) -> Any:
            features = place.norm(x[:, 0])
            return place.head(features), features

    ik.register_family(Trained())  # of the same name: it replaces the other
    out = ik.IdleViTForTraining(ik.apply_idle(model, keep_ratio=0.5))(images())
    torch.testing.assert_close(out.logits, model(images()), rtol=1e-5, atol=1e-5)
    x = Trained().embed(model, images())[0]
    block = ik.remove_idle(copy.deepcopy(model)).layers[1]
    x = model.layers[0](x)
    q, k, _ = block.attention.to_qkv(block.before_attention(x)).chunk(3, 2)
    wanted = ik.token_cut_loss(q.contiguous(), k.contiguous(), out.indices[0], 16**-0.5 / 4)
    torch.testing.assert_close(out.token_cut[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_model_within_others(example: ModuleType, model: nn.Module) -> None:
    outer = nn.ModuleDict({"tower": nn.Sequential(nn.Identity(), model), "head": nn.Linear(2, 2)})
    assert list(ik.idle_blocks(ik.apply_idle(outer))) == [f"tower.1.layers.{i}" for i in (1, 2, 3)]


def test_a_forward_replaced_after_registration_is_refused(
    example: ModuleType, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(example.OwnLayer):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    good = model.layers[2]
    model.layers[2] = Other(64, 4)
    with pytest.raises(TypeError, match="OwnViT cannot idle: its blocks are Other, whose forward is not that of OwnLa"):
        ik.apply_idle(model)
    model.layers[2] = good
    monkeypatch.setattr(example.OwnLayer, "forward", lambda self, tokens: tokens)
    with pytest.raises(TypeError, match="OwnViT cannot idle: its blocks are OwnLayer, whose forward was replaced"):
        ik.apply_idle(model)


def test_a_call_with_more_than_tokens_is_refused(model: nn.Module) -> None:
    ik.apply_idle(model)
    with pytest.raises(TypeError, match="^IdleBlock: OwnLayer must be called with its tokens alone, got mask too"):
        model.layers[1](torch.randn(1, 65, 64), mask=None)


def test_unregistered(example: ModuleType, model: nn.Module, family: Any) -> None:
    families.unregister_family(family)
    with pytest.raises(TypeError, match="model must be one of: .*, or hold one; got own_vit.OwnViT. .*register_family"):
        ik.apply_idle(model)
    with pytest.raises(TypeError, match=r"OwnLayer \(own_vit\), whose forward is not known"):
        ik.IdleBlock(model.layers[0], 0.5)


def test_what_register_family_refuses(example: ModuleType, model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"^register_family: family must be an object: OwnFamily\(\), got"):
        ik.register_family(example.OwnFamily)

    class Nothing:
        name = "nothing"
        forms = ()

    with pytest.raises(TypeError, match=r"like ik.Family, with find\(\), blocks\(\), set_blocks\(\), num_prefix_tok"):
        ik.register_family(Nothing())

    class Second(example.OwnFamily):
        name = "second"

    with pytest.raises(ValueError, match="^register_family: OwnLayer must be a class whose blocks are not known yet"):
        ik.register_family(Second())
    heir = type("Heir", (example.OwnLayer,), {})
    for kind, said in (
        (heir, "Heir must be the class in which the forward is written.*: name OwnLayer"),
        ("OwnLayer", "OwnLayer must be a class itself"),
    ):
        with pytest.raises(ValueError, match=f"^register_family: {said}"):
            form = type("Other", (example.OwnForm,), {"kinds": (kind,)})
            ik.register_family(type("Third", (Second,), {"forms": (form(),)})())
    assert "second" not in families.family_names()
    Second.forms = ()  # the layers are known; the family says where else they stand
    second = Second()
    ik.register_family(second)
    try:
        assert [encoder.family for encoder in families.encoders(model)] == [second]
        assert len(ik.idle_blocks(ik.apply_idle(model))) == 3
    finally:
        families.unregister_family(second)


def test_the_example_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    printed = capsys.readouterr().out
    assert "against dense: 0.0e+00" in printed and "bit for bit: True" in printed and "44 of 64 image" in printed
