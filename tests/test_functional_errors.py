"""Bad input: every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

import idlevit_kernels as ik

B, T, C, n = 2, 7, 8, 3
X = torch.randn(B, T, C)
SCORES = torch.randn(B, T)
INDICES = torch.tensor([[0, 2, 5], [0, 1, 6]])
TOKENS = torch.randn(B, n, C)
VECTOR = torch.randn(C)
NORM = {"norm_weight": VECTOR, "norm_bias": VECTOR, "eps": 1e-6}
COUNTS = {"num_keep": 2, "num_prefix_tokens": 1}

GOOD = {
    "cls_direction": {"x": X, **NORM, "qkv_weight": torch.randn(3 * C, C), "qkv_bias": torch.randn(3 * C)},
    "token_cut_loss": {"q": X, "k": X, "indices": INDICES, "scale": 0.5, "num_prefix_tokens": 1, "kind": "both"},
    "token_scores": {"x": X, "direction": torch.randn(B, C), **NORM},
    "select_tokens": {"scores": SCORES, **COUNTS},
    "select_gather_norm": {"x": X, "scores": SCORES, **COUNTS, **NORM},
    "gather_tokens": {"x": X, "indices": INDICES},
    "scatter_tokens": {"x": X, "indices": INDICES, "tokens": TOKENS},
    "scatter_tokens_": {"x": X, "indices": INDICES, "tokens": TOKENS},
    "expand_tokens": {"tokens": TOKENS, "indices": INDICES, "num_tokens": T},
    "gather_add_norm": {"x": X, "indices": INDICES, "branch": TOKENS, "gamma": VECTOR, "scale": 0.5, **NORM},
    "scatter_add_tokens": {"x": X, "indices": INDICES, "tokens": TOKENS, "branch": TOKENS, "gamma": VECTOR, "scale": 1},
    "scatter_add_tokens_": {
        "x": X, "indices": INDICES, "tokens": TOKENS, "branch": TOKENS, "gamma": VECTOR, "scale": 1,
    },
}  # fmt: skip

BAD_TENSOR = {
    "not a tensor": lambda t: t.tolist(),
    "None": lambda t: None,
    "too few axes": lambda t: t[0],
    "too many axes": lambda t: t[None],
    "integers": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
}
WRONG_SIZE = {
    "one more image": lambda t: torch.cat([t, t[:1]]),
    "one channel less": lambda t: t[..., :-1],
    "one more row": lambda t: torch.cat([t, t[:, :1]], 1),
    "to broadcast": lambda t: t[:1],
}
BAD_INDICES = {
    "int32": lambda t: t.int(),
    "float": lambda t: t.float(),
    "bool": lambda t: t > 0,
    "flat": lambda t: t[0],
    "three axes": lambda t: t[..., None],
    "one more image": lambda t: torch.cat([t, t[:1]]),
    "to broadcast": lambda t: t[:1],
    "more than T": lambda t: torch.arange(T + 1).expand(B, -1),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "on meta": lambda t: t.to("meta"),
}
BAD_NUMBER = {
    "num_keep": (0, -1, T, 10**9, 1.5, "2", None, True, [2]),
    "num_prefix_tokens": (-1, T, T + 1, 1.0, "1", None, False, [1]),
    "num_tokens": (-1, 7.0, "7", None),
    "eps": (0, 0.0, -1e-6, float("nan"), "1e-6", None, [1e-6]),
    "scale": ("1", None, [1.0]),
    "kind": ("all", "", None, 3),
}


def changes(name: str, value: object, first: bool) -> dict:
    """What to try instead of a good argument; the first one of an op has no size to agree with."""
    if name == "indices":
        return BAD_INDICES
    if not isinstance(value, torch.Tensor):
        return {str(bad): lambda _, bad=bad: bad for bad in BAD_NUMBER[name]}
    bad = dict(BAD_TENSOR)
    if value.dim() == 1:
        del bad["None"]  # parameters are optional
        bad |= {"wrong size": lambda t: t[:-1], "to broadcast": lambda t: t[:1]}
    elif not first:
        bad |= WRONG_SIZE
    return bad if first else bad | {"on meta": lambda t: t.to("meta")}


def cases():
    for op, arguments in GOOD.items():
        for i, (name, value) in enumerate(arguments.items()):
            for label, change in changes(name, value, i == 0).items():
                yield pytest.param(op, name, change, id=f"{op}-{name}-{label}")


@pytest.mark.parametrize("op, argument, change", [*cases()])
def test_one_bad_argument(op: str, argument: str, change) -> None:
    arguments = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in GOOD[op].items()}
    bad = change(arguments[argument])
    before = arguments["x"].clone() if "x" in arguments else None
    x = arguments.get("x")
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(ik, op)(**{**arguments, argument: bad})
    came = f"{str(bad.dtype).removeprefix('torch.')}{list(bad.shape)}" if isinstance(bad, torch.Tensor) else repr(bad)
    assert re.match(rf"{op}: {argument} must be .+, got .*{re.escape(came)}", str(error.value), re.DOTALL)
    assert before is None or torch.equal(x, before)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op: str) -> None:
    arguments = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in GOOD[op].items()}
    getattr(ik, op)(**arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("op", ["scatter_tokens", "scatter_tokens_", "scatter_add_tokens", "scatter_add_tokens_"])
def test_tokens_have_the_dtype_of_x(op: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: tokens must be of the dtype of x, torch.float32, got .*\[2, 3, 8\]"):
        getattr(ik, op)(**{**GOOD[op], "tokens": TOKENS.to(dtype)})


# The block


def bad_block_calls():
    block = Block(C, 2)
    yield "x", (X[0], block, 2), {}, ValueError
    yield "x", (X.long(), block, 2), {}, TypeError
    yield "x", ("x", block, 2), {}, TypeError
    yield "x", (X[..., :4], block, 2), {}, ValueError
    yield "num_keep", (X, block, 0), {}, ValueError
    yield "num_keep", (X, block, T), {}, ValueError
    yield "num_keep", (X, block, 0.5), {}, TypeError
    yield "num_prefix_tokens", (X, block, 1, T), {}, ValueError
    yield "num_prefix_tokens", (X, block, 1, -1), {}, ValueError
    yield "scorer", (X, block, 2), {"scorer": "max"}, ValueError
    yield "scorer", (X, block, 2, 0), {"scorer": "cls"}, ValueError
    yield "block", (X, torch.nn.Linear(C, C), 2), {}, TypeError
    yield "block", (X, None, 2), {}, TypeError
    yield "inplace", (X.clone(), block, 2), {"inplace": True}, ValueError
    yield "inplace", (X.clone().requires_grad_(), block, 2), {"inplace": True}, ValueError


@pytest.mark.parametrize("argument, args, kwargs, kind", [*bad_block_calls()])
def test_idle_block(argument: str, args: tuple, kwargs: dict, kind: type) -> None:
    before = args[0].clone() if isinstance(args[0], torch.Tensor) else None
    with pytest.raises(kind, match=f"^idle_block: {argument} must be .+, got") as raised:
        ik.idle_block(*args, **kwargs)
    assert isinstance(raised.value, ik.ArgumentError)
    assert before is None or torch.equal(args[0], before)


def test_in_place_on_shared_memory_raises() -> None:
    x = torch.randn(1, T, C).expand(B, -1, -1)
    with torch.no_grad(), pytest.raises(ValueError, match="^idle_block: x must be .*share memory"):
        ik.idle_block(x, Block(C, 2).eval(), 2, inplace=True)


@pytest.mark.parametrize("ratio, kind", [(0, ValueError), (1.5, ValueError), ("a", TypeError), (None, TypeError)])
def test_idle_block_module_ratio(ratio: object, kind: type) -> None:
    with pytest.raises(kind, match="^IdleBlock: keep_ratio must be"):
        ik.IdleBlock(Block(C, 2), ratio)


@pytest.mark.parametrize("kwargs", [{"is_causal": True}, {"attn_mask": torch.zeros(T, T)}], ids=["causal", "mask"])
def test_idle_block_module_takes_no_mask(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="^IdleBlock: (attn_mask|is_causal) must be"):
        ik.IdleBlock(Block(C, 2), 0.5)(X, **kwargs)


def test_idle_block_module_checks_its_block() -> None:
    with pytest.raises(TypeError, match="^IdleBlock: block must be"):
        ik.IdleBlock(torch.nn.Linear(C, C), 0.5)
    with pytest.raises(ValueError, match="^IdleBlock: num_prefix_tokens must be"):
        ik.IdleBlock(Block(C, 2), 0.5, num_prefix_tokens=-1)
    with pytest.raises(ValueError, match="^IdleBlock: scorer must be"):
        ik.IdleBlock(Block(C, 2), 0.5, scorer="max")


# The model: what was refused is left as it was


def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=3)


def snapshot(model: torch.nn.Module) -> tuple:
    types = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
    return types, {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}


def assert_same(model: torch.nn.Module, before: tuple) -> None:
    types, state = snapshot(model)
    assert types == before[0]
    assert list(state) == list(before[1])
    for name, (identity, value) in state.items():
        assert identity == before[1][name][0] and torch.equal(value, before[1][name][1])


BAD_APPLY = {
    "ratio 0": ({"keep_ratio": 0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0"),
    "ratio above 1": ({"keep_ratio": 1.01}, ValueError, r"keep_ratio must be in \(0, 1\], got 1.01"),
    "ratio nan": ({"keep_ratio": float("nan")}, ValueError, r"keep_ratio must be in \(0, 1\], got nan"),
    "ratio text": ({"keep_ratio": "0.7"}, TypeError, "keep_ratio must be a number"),
    "ratio bool": ({"keep_ratio": True}, TypeError, "keep_ratio must be a number"),
    "short schedule": ({"schedule": [1.0, 0.5, 0.5]}, ValueError, "schedule must be one keep ratio for each of the 4"),
    "long schedule": ({"schedule": [0.5] * 5}, ValueError, "schedule must be .* 4 layers, got 5 ratios$"),
    "empty schedule": ({"schedule": []}, ValueError, "schedule must be"),
    "bad entry": (
        {"schedule": [1.0, 0.5, 0.5, 0.0]},
        ValueError,
        r"schedule\[3\] must be in \(0, 1\], got 0",
    ),
    "bad entry type": ({"schedule": [1.0, 0.5, 0.5, "a"]}, TypeError, r"schedule\[3\] must be a number"),
    "schedule text": ({"schedule": "1111"}, TypeError, "schedule must be a sequence"),
    "schedule number": ({"schedule": 0.5}, TypeError, "schedule must be a sequence"),
    "both": ({"keep_ratio": 0.7, "schedule": [1.0] * 4}, ValueError, "schedule must be None where keep_ratio is given"),
    "scorer": ({"scorer": "max"}, ValueError, "scorer must be one of"),
    "scorer type": ({"scorer": None}, (ValueError, TypeError), "scorer must be one of"),
}


@pytest.mark.parametrize("kwargs, kind, text", BAD_APPLY.values(), ids=BAD_APPLY)
def test_apply_idle(kwargs: dict, kind: type, text: str) -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(kind, match=f"^apply_idle: {text}"):
        ik.apply_idle(model, **kwargs)
    assert_same(model, before)


def test_already_idle() -> None:
    model = ik.apply_idle(vit(), keep_ratio=0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="^apply_idle: model must be dense.*remove_idle.*got"):
        ik.apply_idle(model, keep_ratio=0.7)
    assert_same(model, before)


def test_remove_from_a_dense_model() -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match="^remove_idle: model must be .*got .*VisionTransformer"):
        ik.remove_idle(model)
    assert_same(model, before)


@pytest.mark.parametrize("model", [None, "deit_small_patch16_224", lambda x: x])
def test_no_module(model: object) -> None:
    with pytest.raises(TypeError, match="^apply_idle: model must be a torch.nn.Module, got"):
        ik.apply_idle(model)
    with pytest.raises(TypeError, match="^remove_idle: model must be a torch.nn.Module, got"):
        ik.remove_idle(model)
    with pytest.raises(TypeError, match="^idle_blocks: model must be a torch.nn.Module, got"):
        ik.idle_blocks(model)
