"""What an idle model computes is never a copy that drifted: what is hooked, patched, swapped or changed is honoured.

Over all families; each test is the right answer to a fault that users of such packages have met.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from families import MAKE, SEQUENCES, attention_of, image_for, make, run
from timm.models._features_fx import create_feature_extractor
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.nn.utils import prune

import idlevit_kernels as ik

pytestmark = pytest.mark.usefixtures("one_thread")

each_family = pytest.mark.parametrize("family", MAKE)


def depth(model: nn.Module) -> int:
    return len(ik.idle_config(ik.apply_idle(copy.deepcopy(model), keep_ratio=1.0))["schedule"])


def idle(model: nn.Module, ratio: float) -> nn.Module:
    return ik.apply_idle(model, schedule=[ratio] * depth(model))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Also of a dense model: those that would idle."""
    names = [n for n, m in idle(copy.deepcopy(model), 0.5).named_modules() if isinstance(m, ik.IdleBlock)]
    return [model.get_submodule(name) for name in names]


# Hooks


class Calls:
    """Hooks on the modules of a model by name; what each was given and gave."""

    def __init__(self, model: nn.Module, names: list[str] | None = None):
        self.seen: dict[str, list[tuple[Any, Any]]] = {}
        for name, module in model.named_modules():
            if name and (names is None or name in names):
                module.register_forward_hook(functools.partial(self.record, name))

    def record(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        def shape(value: Any) -> Any:
            return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__

        self.seen.setdefault(name, []).append(([shape(a) for a in args], shape(out)))


@each_family
@torch.no_grad()
def test_hooks_see_what_they_see_in_the_dense_model(family: str) -> None:
    """All at once, then one at a time; with all tokens kept, calls and shapes are those of the dense model."""
    image = image_for(family)
    dense = make(family)
    expected = Calls(dense)
    wanted = run(dense, image)
    model = idle(make(family), 1.0)
    found = Calls(model)
    torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
    assert found.seen == expected.seen
    for name in [name for name, _ in dense.named_modules() if name]:
        model = idle(make(family), 1.0)
        found = Calls(model, [name])
        torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
        assert found.seen.get(name) == expected.seen.get(name), name


@each_family
@pytest.mark.parametrize("grad", [False, True])
def test_a_module_is_called_once_where_tokens_idle(family: str, grad: bool) -> None:
    image, dense = image_for(family), make(family)
    expected = Calls(dense)
    model = idle(make(family), 0.5)
    with torch.set_grad_enabled(grad):
        run(dense, image)
        wanted = run(model, image)
        found = Calls(model)
        torch.testing.assert_close(run(model, image), wanted, rtol=1e-4, atol=1e-4)
    assert {n: len(c) for n, c in found.seen.items()} == {n: len(c) for n, c in expected.seen.items()}
    assert found.seen != expected.seen  # fewer tokens


# Patches


class Doubled:
    """In place of a module's forward."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.calls = forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        out = self.forward(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


PARTS = ("attention", "mlp", "norm", "whole block")


def part_of(block: nn.Module, part: str) -> nn.Module:
    if part == "attention":
        return attention_of(block)[1]
    if part == "norm":
        return block.norm1 if hasattr(block, "norm1") else block.layernorm_before
    return block.mlp if part == "mlp" else block


@each_family
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_forward_replaced_on_an_object_is_called(family: str, part: str, when: str) -> None:
    image, dense = image_for(family), make(family)
    for block in blocks_of(dense):
        patched = part_of(block, part)
        patched.forward = Doubled(patched.forward)
    wanted = run(dense, image)
    model = make(family)
    if when == "after":
        model = idle(model, 1.0)
    spies = []
    for block in [m for m in model.modules() if isinstance(m, ik.IdleBlock)] or blocks_of(model):
        patched = part_of(block, part)
        patched.forward = Doubled(patched.forward)
        spies.append(patched.forward)
    if when == "before":
        unfit = part == "whole block" or (part == "attention" and family not in SEQUENCES)
        if unfit:
            with pytest.raises(TypeError, match="apply_idle: .*(replaced on the object|has another forward)"):
                ik.apply_idle(model, keep_ratio=1.0)
            return
        model = idle(model, 1.0)
    torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
    assert [spy.calls for spy in spies] == [1] * len(spies)
    if part == "whole block":
        with pytest.raises(RuntimeError, match="remove_idle: the forward of an idle block was replaced on the object"):
            ik.remove_idle(model)
        return
    ik.set_keep_ratio(model, [0.5] * len(spies))
    if part == "attention" and family not in SEQUENCES:
        with pytest.raises(TypeError, match="its attention, .*, has another forward, which cannot be given the kept"):
            run(model, image)
        return
    run(model, image)
    assert [spy.calls for spy in spies] == [2] * len(spies)


@each_family
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_a_forward_replaced_on_a_class_is_called(family: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After apply_idle, and seen at the next call."""
    image, model = image_for(family), idle(make(family), 1.0)
    run(model, image)
    block = next(m for m in model.modules() if isinstance(m, ik.IdleBlock))
    kind = block.dense_kind if part == "whole block" else type(part_of(block, part))
    original, calls = kind.forward, []

    @functools.wraps(original)  # copies the names that could give it away
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return Doubled(functools.partial(original, self))(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", doubled)
    wanted = run(make(family), image)
    count = len(calls)
    torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * count
    ik.set_keep_ratio(model, [0.5] * depth_of(model))
    scored_by_it = part == "norm" and family == "Twins"  # whose pooling has such a norm
    if part == "whole block" or (part == "attention" and family not in SEQUENCES) or scored_by_it:
        with pytest.raises(
            TypeError, match="IdleBlock: block must be one that can idle, got .*(forward|for the scores)"
        ):
            run(model, image)
    else:
        run(model, image)
        assert len(calls) == 3 * count


def depth_of(model: nn.Module) -> int:
    return sum(isinstance(m, ik.IdleBlock) for m in model.modules())


# Values


@each_family
@torch.no_grad()
def test_an_idle_model_is_freed_with_its_last_reference(family: str) -> None:
    """What is looked up of a block is kept as long as the block, no longer."""
    model = idle(make(family), 0.5)
    run(model, image_for(family))
    blocks = [weakref.ref(m) for m in model.modules() if isinstance(m, ik.IdleBlock)]
    assert blocks and all(b() is not None for b in blocks)
    del model
    gc.collect()
    assert all(b() is None for b in blocks)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": lambda block: setattr(block.norm1, "eps", 0.7),
    "num_heads": lambda block: (setattr(block.attn, "num_heads", 4), setattr(block.attn, "head_dim", 8)),
    "approximate": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "scale": lambda block: (setattr(block.attn, "fused_attn", False), setattr(block.attn, "scale", 1.3)),
    "scale, fused": lambda block: setattr(block.attn, "scale", 1.3),  # which PyTorch's fused attention does not read
    "dropout": lambda block: (block.attn.proj_drop.__setattr__("p", 0.5), block.attn.proj_drop.train()),
    "attention dropout": lambda block: (block.attn.attn_drop.__setattr__("p", 0.5), block.attn.train()),
    "gamma": lambda block: setattr(block.ls1, "gamma", nn.Parameter(block.ls1.gamma * 3)),
    "data": lambda block: setattr(block.attn.qkv.weight, "data", block.attn.qkv.weight.data * 2),
    "bias": lambda block: setattr(block.mlp.fc2, "bias", None),
    "norm": lambda block: setattr(block, "norm2", nn.LayerNorm(32, eps=0.3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@torch.no_grad()
def test_a_value_changed_after_the_first_call_is_seen(change: str, ratio: float) -> None:
    image = image_for("timm ViT")
    model = idle(make("timm ViT"), ratio)
    before = run(model, image)
    fresh = make("timm ViT")
    for changed in (model, fresh):
        for block in changed.blocks:
            CHANGES[change](block)
    torch.manual_seed(0)
    found = run(model, image)
    torch.manual_seed(0)
    torch.testing.assert_close(found, run(idle(fresh, ratio), image), rtol=1e-5, atol=1e-5)
    if ratio == 1:
        dense = ik.remove_idle(fresh)
        torch.manual_seed(0)
        torch.testing.assert_close(found, run(dense, image), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, before) == (change == "scale, fused")


# An idle block is an instance of its block's class


@each_family
def test_class_name_and_instance(family: str) -> None:
    dense = make(family)
    kinds = [type(block) for block in blocks_of(dense)]
    model = idle(dense, 0.5)
    idle_blocks = [m for m in model.modules() if isinstance(m, ik.IdleBlock)]
    for block, kind in zip(idle_blocks, kinds, strict=True):
        assert isinstance(block, kind) and type(block).__name__ == kind.__name__
        assert block._get_name() == f"Idle{kind.__name__}" and f"Idle{kind.__name__}(" in repr(model)
        assert get_module_class_from_name(model, kind.__name__) in (kind, type(block))


@each_family
def test_wrap_policies_find_blocks_by_class(family: str) -> None:
    dense = make(family)
    kinds = tuple({type(block) for block in blocks_of(dense)})
    model = idle(dense, 0.5)
    wrappers.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))
    wrapped = [m for m in model.modules() if isinstance(m, wrappers.CheckpointWrapper)]
    assert len(wrapped) == depth_of(model)
    run(model, image_for(family)).sum().backward()
    ik.remove_idle(model)
    assert len([m for m in model.modules() if isinstance(m, wrappers.CheckpointWrapper)]) == len(wrapped)


@pytest.mark.parametrize("family", ["transformers ViT", "transformers DINOv2"])
def test_device_maps_keep_layers_whole(family: str) -> None:
    def device_map(model: nn.Module) -> dict:
        layer = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
        size = sum(p.numel() * 4 for p in layer.parameters())
        memory = {0: int(2.5 * size), "cpu": 10**9}
        return accelerate.infer_auto_device_map(
            model, max_memory=memory, no_split_module_classes=model._no_split_modules
        )

    assert device_map(idle(make(family), 0.5)) == device_map(make(family))


@each_family
@torch.no_grad()
def test_there_and_back_the_same_objects(family: str) -> None:
    """With attributes, buffers and hooks that were set before and meanwhile; other objects stay where they were put."""
    model, image, called = make(family), image_for(family), []
    blocks = blocks_of(model)
    for i, block in enumerate(blocks):
        block.layer_id = i
        block.register_buffer("mine", torch.tensor(float(i)))
    handle = blocks[0].register_forward_hook(lambda *_: called.append("before"))
    wanted, keys = run(model, image), list(model.state_dict())
    idle(model, 0.5)
    assert list(model.state_dict()) == keys
    idles = [m for m in model.modules() if isinstance(m, ik.IdleBlock)]
    assert [b.layer_id for b in idles] == list(range(len(blocks)))
    assert [b.mine.item() for b in idles] == list(range(len(blocks)))
    idles[0].layer_id, idles[0].note = 7, "new"
    idles[-1].register_forward_hook(lambda *_: called.append("meanwhile"))
    called.clear()
    run(model, image)
    assert called == ["before", "meanwhile"]
    ik.remove_idle(model)
    back = blocks_of(model)
    assert all(a is b for a, b in zip(back, blocks, strict=True))
    assert blocks[0].layer_id == 7 and blocks[0].note == "new" and not hasattr(blocks[0], "_idling")
    called.clear()
    assert torch.equal(run(model, image), wanted) and called == ["before", "meanwhile"]
    handle.remove()
    called.clear()
    run(model, image)
    assert called == ["meanwhile"]


@each_family
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy of a copy"])
@torch.no_grad()
def test_copies_idle_and_come_back(family: str, how: str) -> None:
    model, image = make(family), image_for(family)
    dense = run(model, image)
    idle(model, 0.5)
    wanted = run(model, image)
    twin = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    if how == "copy of a copy":
        twin = copy.deepcopy(twin)
    assert torch.equal(run(twin, image), wanted)
    ik.remove_idle(model)
    assert torch.equal(run(model, image), dense)
    assert torch.equal(run(twin, image), wanted)
    assert torch.equal(run(ik.remove_idle(twin), image), dense)
    assert not any(isinstance(m, ik.IdleBlock) or type(m).__name__ == "IdleSequential" for m in twin.modules())


@pytest.mark.parametrize("by", ["Identity", "checkpoint_wrapper", "torch.compile"])
def test_remove_idle_after_a_block_was_replaced(by: str) -> None:
    model = idle(make("timm ViT"), 0.5)
    edit = {
        "Identity": lambda block: nn.Identity(),
        "checkpoint_wrapper": wrappers.checkpoint_wrapper,
        "torch.compile": lambda block: torch.compile(block, backend="eager"),
    }[by]
    model.blocks[1] = edit(model.blocks[1])
    if by == "torch.compile":
        with pytest.raises(
            TypeError, match="remove_idle: .* wrapped in OptimizedModule .torch.compile.*unwrap it first"
        ):
            ik.remove_idle(model)
        assert depth_of(model) == 2
        model.blocks[1] = model.blocks[1]._orig_mod
    ik.remove_idle(model)
    assert depth_of(model) == 0 and type(model.blocks) is nn.Sequential


def test_a_swap_of_the_class_does_not_end_idling() -> None:
    class Mine(Block):
        pass

    model = idle(make("timm ViT"), 0.5)
    block = model.blocks[0]
    with pytest.raises(TypeError, match="__class__ must become a subclass of Block as it is, got Mine.*remove_idle"):
        block.__class__ = Mine
    block.__class__ = type("FSDPBlock", (type(block),), {})  # what fully_shard does
    assert run(model, image_for("timm ViT")).shape == (2, 5)


def test_an_attention_swapped_by_its_class_is_called() -> None:
    class Pair(Attention):
        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            return super().forward(x, **kwargs), None

    model, image = idle(make("timm ViT"), 0.5), image_for("timm ViT")
    run(model, image)
    model.blocks[0].attn.__class__ = Pair
    with pytest.raises(
        TypeError, match="IdleBlock: Pair must return a tensor like its input, float32.2, 9, 32.*a tuple"
    ):
        run(model, image)


class Loud(ik.IdleBlock):
    calls = 0

    def forward(self, x: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        Loud.calls += 1
        return super().forward(x, **kwargs)


@pytest.mark.parametrize("grad", [False, True])
def test_a_subclass_of_idle_block_is_called(grad: bool) -> None:
    model, image = make("timm ViT"), image_for("timm ViT")
    wanted = run(idle(copy.deepcopy(model), 0.5), image)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Loud(block, 0.5)
    assert (
        isinstance(model.blocks[0], (Loud, Block))
        and type(pickle.loads(pickle.dumps(model)).blocks[0]).idle_kind is Loud
    )
    Loud.calls = 0
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
    assert Loud.calls == 2
    sequence = ik.block.IdleSequential(*model.blocks)
    with torch.set_grad_enabled(grad):
        sequence(torch.randn(1, 17, 32))
    assert Loud.calls == 4


def test_a_block_compiled_by_itself() -> None:
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    image = image_for("timm ViT")
    model = idle(make("timm ViT"), 0.5)
    wanted = run(model, image)
    for block in model.blocks:
        block.compile(backend=backend)
    for grad in (False, True):
        calls.clear()
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
    calls.clear()
    run(ik.remove_idle(model), image)
    assert not calls
    compiled = make("timm ViT")
    compiled.blocks[0].compile(backend=backend)
    with pytest.raises(TypeError, match="call apply_idle first, then block.compile"):
        ik.apply_idle(compiled, 0.5)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_timm_extracts_features_by_fx(ratio: float) -> None:
    model, image = idle(make("timm ViT"), ratio), image_for("timm ViT")
    (found,) = create_feature_extractor(model, {"blocks.0": "f"})(image).values()
    kept = []
    model.blocks[0].register_forward_hook(lambda _, args, out: kept.append(out))
    run(model, image)
    torch.testing.assert_close(found, kept[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["timm ViT", "Swin"])
def test_torchscript_is_refused_in_a_sentence(family: str) -> None:
    model = idle(make(family), 0.5)
    for attempt in (lambda: torch.jit.script(model), lambda: torch.jit.trace(model, image_for(family))):
        with pytest.raises(RuntimeError, match="TorchScript .* is not supported; use torch.export"):
            attempt()


# Offloaded, sharded and wrapped tensors


REFUSED = "has another forward|cannot be read for the scores|take off accelerate's hooks"


# accelerate loses the buffers of the other two, so that their dense models compute something else as well.
@pytest.mark.parametrize("family", [f for f in MAKE if f not in ("EVA-02", "Swin V2")])
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_offloaded_weights(family: str, when: str) -> None:
    """With all tokens kept as dense; below, where an attention has parameters of its own, refused: they come and go."""
    image, model = image_for(family), make(family)
    wanted = run(model, image)
    half = run(idle(copy.deepcopy(model), 0.5), image)
    if when == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        try:
            model = ik.apply_idle(model, schedule=[1.0] * depth(make(family)))
        except TypeError as error:
            assert re.search(REFUSED, str(error)) and family in ("Swin", "Twins")  # noqa: PT017
            assert depth_of(model) == 0
            torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
            return
    else:
        model = idle(model, 1.0)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
    ik.set_keep_ratio(model, [0.5] * depth_of(model))
    if family in ("Swin", "Twins"):
        with pytest.raises(TypeError, match=REFUSED):
            run(model, image)
    else:
        torch.testing.assert_close(run(model, image), half, rtol=1e-5, atol=1e-5)


class Wrapped(Tensor):
    """A tensor that only its own dispatch can read, as those of torchao and DTensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        unwrap = functools.partial(torch.utils._pytree.tree_map_only, Wrapped, lambda t: t.inner)
        return func(*unwrap(args), **unwrap(kwargs or {}))


@each_family
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_wrapped_parameters(family: str, context: Any) -> None:
    """Each parameter of a block in turn, as a tensor whose address means nothing."""
    model, image = idle(make(family).requires_grad_(False), 0.5), image_for(family)
    with torch.no_grad():
        wanted = run(model, image)
    block = next(m for m in model.modules() if isinstance(m, ik.IdleBlock))
    for name, parameter in list(block.named_parameters()):
        holder, _, last = name.rpartition(".")
        holder = block.get_submodule(holder)
        holder._parameters[last] = nn.Parameter(Wrapped(parameter.detach()), requires_grad=False)
        with context():
            if family == "Twins" and name in ("attn.q.weight", "attn.q.bias", "attn.kv.weight", "attn.kv.bias"):
                with pytest.raises(TypeError, match=REFUSED):
                    run(model, image)
            else:
                torch.testing.assert_close(
                    run(model, image), wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        holder._parameters[last] = parameter


# What stands around the blocks, and what comes out of their parts


class OwnSequential(nn.Sequential):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        OwnSequential.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("how", ["subclass", "patched", "compiled"])
@torch.no_grad()
def test_a_container_of_blocks_goes_on_to_be_called(how: str) -> None:
    image = image_for("timm ViT")
    wanted = run(idle(make("timm ViT"), 0.5), image)
    model, calls, expected = make("timm ViT"), [], 1

    def counted(graph: Any, _: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    if how == "subclass":
        model.blocks = OwnSequential(*model.blocks)
        OwnSequential.calls = 0
    elif how == "patched":
        forward = model.blocks.forward
        model.blocks.forward = lambda x: (calls.append(1), forward(x))[1]
    else:  # into one graph, or one for each block (PyTorch 2.10)
        dense = make("timm ViT")
        dense.blocks.compile(backend=counted)
        run(dense, image)
        expected = len(calls)
        calls.clear()
        model.blocks.compile(backend=counted)
    container = model.blocks
    torch.testing.assert_close(run(ik.apply_idle(model, schedule=[0.5, 0.5]), image), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) + OwnSequential.calls * (how == "subclass") == expected
    assert model.blocks is container and ik.remove_idle(model).blocks is container


@torch.no_grad()
def test_a_call_replaced_on_a_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    image, calls = image_for("timm ViT"), []
    model = idle(make("timm ViT"), 0.5)
    wanted = run(model, image)
    mlp = type(model.blocks[0].mlp)

    def spied(method: Any) -> Any:
        return lambda m, *args, **kwargs: (calls.append(m), method(m, *args, **kwargs))[1]

    for kind, name in ((mlp, "__call__"), (Block, "__call__"), (ik.IdleBlock, "__call__"), (ik.IdleBlock, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, spied(getattr(kind, name)))
            torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
            assert len(calls) == 2, kind
            calls.clear()
        run(model, image)
        assert not calls
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", spied(nn.Linear.__call__))
        torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)
        assert len(calls) == 9  # four a block, and the head


@pytest.mark.parametrize("part", ["attn", "mlp", "norm1", "scorer"])
@torch.no_grad()
def test_a_lazy_minus_sign_out_of_a_part_is_seen(part: str) -> None:
    block, x = make("timm ViT").blocks[0], torch.randn(2, 17, 32)

    def negated(t: Tensor) -> Tensor:
        return torch._neg_view(-t)

    def scores(x: Tensor, _: Any) -> Tensor:
        return x.norm(dim=2)

    if part == "scorer":
        wanted = ik.idle_block(x, block, 8, scorer=scores)
        found = ik.idle_block(x, block, 8, scorer=lambda x, b: negated(scores(x, b)))
    else:
        wanted = ik.idle_block(x, block, 8)
        forward = getattr(block, part).forward
        getattr(block, part).forward = lambda *a, **k: negated(forward(*a, **k))
        found = ik.idle_block(x, block, 8)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_weight_that_a_hook_makes_is_never_stale() -> None:
    model, image = idle(make("timm ViT"), 0.5), image_for("timm ViT")
    for block in model.blocks:
        prune.identity(block.attn.qkv, "weight")
    run(model, image)
    for block in model.blocks:
        block.attn.qkv.weight_orig.mul_(torch.randn_like(block.attn.qkv.weight_orig))
    first = run(model, image)
    assert torch.equal(run(model, image), first)
    for block in model.blocks:
        prune.remove(block.attn.qkv, "weight")
    torch.testing.assert_close(run(model, image), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Swin", "Swin V2", "Twins"])
@torch.no_grad()
def test_dropout_follows_its_own_mode(family: str) -> None:
    """As Monte-Carlo dropout sets it: the model in evaluation, its dropouts in training."""
    image, dense = image_for(family), make(family)
    for block in blocks_of(dense):
        block.attn.fused_attn = False
        block.attn.attn_drop.p = 0.5
        block.attn.attn_drop.train()
    model = idle(copy.deepcopy(dense), 1.0)
    for ratio in (1.0, 0.5):
        ik.set_keep_ratio(model, [ratio] * depth_of(model))
        assert not torch.equal(run(model, image), run(model, image))
    ik.set_keep_ratio(model, [1.0] * depth_of(model))
    torch.manual_seed(0)
    wanted = run(dense, image)
    torch.manual_seed(0)
    torch.testing.assert_close(run(model, image), wanted, rtol=1e-5, atol=1e-5)


def test_autocast_with_a_wide_first_layer() -> None:
    model, image = idle(make("timm ViT"), 0.5), image_for("timm ViT")
    for block in model.blocks:
        forward = block.mlp.fc1.forward
        block.mlp.fc1.forward = lambda x, forward=forward: forward(x).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, image)
    out.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_settings_that_no_configuration_holds() -> None:
    model = ik.apply_idle(make("timm ViT"), num_keep=[None, 8])
    model.blocks[0].keep_ratio = 0.5
    with pytest.raises(ValueError, match="idle_config: model must be one with ratios or with counts"):
        ik.idle_config(model)


def test_indices_and_cut_of_windows() -> None:
    block = make("Swin").layers[0].blocks[0]
    x = torch.randn(2, 8, 8, 16)
    for keep, count in ((1.0, 16), (0.5, 8)):
        out = ik.IdleBlock(block, keep, 0)(x, return_cut="none")
        assert out.indices.shape == (8, count) and out.tokens.shape == x.shape
    with pytest.raises(TypeError, match="return_cut must be 'none' or None here"):
        ik.IdleBlock(block, 1.0, 0)(x, return_cut="both")
    with pytest.raises(ValueError, match="idle_block: num_prefix_tokens must be 0 for a block whose tokens are a grid"):
        ik.idle_block(x, block, 8)


@torch.no_grad()
def test_padding_ranks_last_with_any_scorer() -> None:
    block = make("Swin").layers[0].blocks[0]
    x = torch.randn(1, 6, 6, 16)  # in windows of 4 x 4, of which one has 4 tokens and 12 places of padding
    for how in ({"scorer": lambda t, _: -t.norm(dim=2)}, {"scorer": "random"}):
        out = ik.idle_block(x, block, 4, 0, **how)
        assert int((out != x).any(3).sum()) == 16
