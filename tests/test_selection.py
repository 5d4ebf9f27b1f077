"""Own scorers, own selections, counts in place of ratios, and settings that can be read, kept and changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import MAKE, SEQUENCES, image_for, make, run
from torch import Tensor, nn

import idlevit_kernels as ik
from idlevit_kernels.measure.tune import Target, tune_schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def by_length(x: Tensor, block: nn.Module) -> Tensor:
    """A scorer: the length of a token."""
    return x.norm(dim=2)


def every_second(tokens: Tensor, num_keep: int) -> Tensor:
    """A selection: every second token from the last on, then those between."""
    last = tokens.shape[1] - 1
    order = torch.cat([torch.arange(first, -1, -2, device=tokens.device) for first in (last, last - 1)])
    return order[:num_keep].expand(len(tokens), -1)


@pytest.mark.parametrize("family", SEQUENCES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_scorer_of_ones_own(family: str, grad: bool) -> None:
    model, image, seen = make(family), image_for(family), []
    ik.apply_idle(model, schedule=[0.5, 0.5], scorer=by_length)
    block = next(iter(ik.idle_blocks(model).values()))
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.set_grad_enabled(grad):
        run(model, image)
    x, out = seen[0]
    P = block.num_prefix_tokens
    kept = x[:, P:].norm(dim=2).topk((x.shape[1] - P) // 2).indices + P
    changed = (out != x).any(2)
    wanted = torch.zeros_like(changed).scatter(1, kept, True)
    wanted[:, :P] = True
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("family", SEQUENCES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_selection_of_ones_own(family: str, grad: bool) -> None:
    model, image, seen = make(family), image_for(family), []
    ik.apply_idle(model, schedule=[0.25, 0.5], select=every_second)
    block = next(iter(ik.idle_blocks(model).values()))
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.set_grad_enabled(grad):
        run(model, image)
    x, out = seen[0]
    P, N = block.num_prefix_tokens, x.shape[1] - block.num_prefix_tokens
    places = [P + N - 1 - 2 * i for i in range(N // 4)]
    assert (out != x).any(2).nonzero()[:, 1].view(2, -1).tolist() == [[*range(P), *sorted(places)]] * 2


def test_random_tokens() -> None:
    model, image = make("timm ViT"), image_for("timm ViT")
    ik.apply_idle(model, schedule=[0.5, 0.5], scorer="random")
    x = torch.randn(64, 17, 32)
    _, indices = ik.idle_block(x, model.blocks[0], 8, scorer="random", return_indices=True)
    assert len({tuple(row) for row in indices.tolist()}) > 50
    assert (indices[:, 1:].flatten().bincount(minlength=17)[1:] > 10).all()
    torch.manual_seed(0)
    first = run(model, image)
    torch.manual_seed(0)
    assert torch.equal(run(model, image), first)
    assert not torch.equal(run(model, image), first)


def test_own_functions_in_training_tune_and_pictures() -> None:
    image = image_for("timm ViT")
    for how in ({"scorer": by_length}, {"select": every_second}, {"scorer": "random"}):
        model = ik.apply_idle(make("timm ViT"), schedule=[0.5, 0.5], **how)
        out = ik.IdleViTForTraining(model)(image)
        assert [tuple(i.shape) for i in out.indices] == [(2, 9)] * 2 and (out.token_cut > 0).all()
        if how == {"select": every_second}:
            assert out.indices[0].tolist() == [[0, *range(2, 17, 2)]] * 2
        (out.logits.square().sum() + out.token_cut.sum()).backward()
        layers = ik.selections(model, image)
        assert [int(layer.kept.sum()) for layer in layers[0]] == [8, 8]
        target = Target("macs", 0.8 * ik.count_macs(make("timm ViT")).total)
        tuned = tune_schedule(make("timm ViT"), target, **how, seconds=0.1)
        assert len(tuned.schedule) == 2


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        ("cat", TypeError, "scorer: the result must be a float tensor .B, T., got"),
        (torch.zeros(2, 17, dtype=torch.int64), TypeError, "scorer: the result must be a float tensor"),
        (torch.zeros(2, 16), ValueError, r"scorer: the result must be \[B, T\] = \[2, 17\] on cpu, got"),
    ],
)
def test_what_a_scorer_must_return(result: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ik.idle_block(torch.randn(2, 17, 32), make("timm ViT").blocks[0], 8, scorer=lambda x, block: result)


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        (torch.zeros(2, 8), TypeError, "select: the result must be an int64 tensor .B, num_keep., got"),
        (torch.arange(7).expand(2, -1), ValueError, r"select: the result must be \[B, num_keep\] = \[2, 8\] on cpu"),
        (
            torch.arange(9, 17).expand(2, -1),
            ValueError,
            r"different indices in \[0, N\) = \[0, 16\) in each",
        ),
        (torch.zeros(2, 8, dtype=torch.int64), ValueError, "different indices .* some perhaps twice"),
    ],
)
def test_what_a_selection_must_return(result: Tensor, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ik.idle_block(torch.randn(2, 17, 32), make("timm ViT").blocks[0], 8, select=lambda tokens, num_keep: result)


@pytest.mark.parametrize("family", MAKE)
@torch.no_grad()
def test_counts_in_place_of_ratios(family: str) -> None:
    model, image = make(family), image_for(family)
    depth = len(ik.idle_config(ik.apply_idle(copy.deepcopy(model), 1.0))["schedule"])
    counted = ik.apply_idle(copy.deepcopy(model), num_keep=[None, *[3] * (depth - 1)])
    config = ik.idle_config(counted)
    assert config["num_keep"] == [None, *[3] * (depth - 1)] and len(ik.idle_blocks(counted)) == depth - 1
    again = ik.apply_idle(copy.deepcopy(model), **json.loads(json.dumps(config)))
    assert torch.equal(run(again, image), run(counted, image))
    for block in ik.idle_blocks(counted).values():
        assert block.keep_ratio is None and block.keep == 3 and "num_keep=3" in repr(block)
    with pytest.raises(ValueError, match="num_keep must be in .1, N. with N"):
        run(ik.apply_idle(model, num_keep=[5000] * depth), image)


@pytest.mark.parametrize("family", MAKE)
@torch.no_grad()
def test_the_ratio_of_a_live_model(family: str) -> None:
    dense, image = make(family), image_for(family)
    model = ik.apply_idle(copy.deepcopy(dense), 0.9)
    for ratio in (0.5, 1.0, 0.7):
        ik.set_keep_ratio(model, ratio)
        fresh = ik.apply_idle(copy.deepcopy(dense), ratio)
        assert torch.equal(run(model, image), run(fresh, image)) and ik.idle_config(model) == ik.idle_config(fresh)
        again = ik.apply_idle(copy.deepcopy(dense), **json.loads(json.dumps(ik.idle_config(model))))
        assert torch.equal(run(again, image), run(model, image))
    before = ik.idle_config(model)
    for bad, kind in ((0, ValueError), ("much", TypeError), ([0.5] * 40, ValueError)):
        with pytest.raises(kind, match="set_keep_ratio: "):
            ik.set_keep_ratio(model, bad)
    assert ik.idle_config(model) == before
    with pytest.raises(ValueError, match="set_keep_ratio: model must be idle .call apply_idle first."):
        ik.set_keep_ratio(dense, 0.5)


def test_a_function_has_no_json() -> None:
    model = ik.apply_idle(make("timm ViT"), 0.5, scorer=by_length)
    with pytest.raises(ValueError, match="idle_config: scorer must be a name, for a function is no JSON"):
        ik.idle_config(model)


def test_old_spellings_name_the_new_ones() -> None:
    block, x = make("timm ViT").blocks[0], torch.randn(2, 17, 32)
    with pytest.raises(TypeError, match="idle_block: cut= was replaced in version 0.2.0: use return_cut="):
        ik.idle_block(x, block, 8, cut="both")
    with pytest.raises(TypeError, match="idle_block: it has no argument 'gut'"):
        ik.idle_block(x, block, 8, gut="both")
    with pytest.raises(TypeError, match="IdleBlock: cut= was replaced in version 0.2.0: use return_cut="):
        ik.IdleBlock(block, 0.5)(x, cut="both")
    with pytest.raises(TypeError, match="apply_idle: batch= was replaced in version 0.2.0: use adaptive_batch=N"):
        ik.apply_idle(make("timm ViT"), 0.5, batch=2)
    with pytest.raises(ValueError, match=r"apply_idle: num_keep must be None where keep_ratio is given"):
        ik.apply_idle(make("timm ViT"), 0.5, num_keep=[1, 2])
    with pytest.raises(ValueError, match="apply_idle: num_keep must be one count for each of the 2 layers"):
        ik.apply_idle(make("timm ViT"), num_keep=[1])


def test_the_cut_is_a_keyword_that_hooks_see() -> None:
    model, x, seen = ik.apply_idle(make("timm ViT"), schedule=[0.5, 1.0]), torch.randn(2, 17, 32), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    out = model.blocks[0](x, return_cut="both")
    assert isinstance(out, ik.IdleOutput) and out.tokens.shape == x.shape and out.indices.shape == (2, 9)
    assert out.token_cut.shape == () and out.token_cut > 0
    dense = model.blocks[1](x, return_cut="both")
    assert dense.token_cut == 0 and dense.indices.tolist() == [list(range(17))] * 2
    assert model.blocks[0](x, return_cut="none").token_cut == 0
    assert seen == [{"return_cut": "both"}] * 2 + [{"return_cut": "none"}]


def test_in_place_asks_for_no_gradients() -> None:
    block, x = make("timm ViT").blocks[0], torch.randn(2, 17, 32)
    message = "inplace must be False while gradients are recorded and x or a parameter requires one"
    with pytest.raises(ValueError, match=f"idle_block: {message}"):
        ik.idle_block(x, block, 8, inplace=True)
    with pytest.raises(ValueError, match=f"IdleBlock: {message}"):
        ik.IdleBlock(block, 0.5)(x, inplace=True)
    block.requires_grad_(False)
    wanted = ik.idle_block(x, block, 8)
    assert ik.idle_block(x, block, 8, inplace=True) is x and torch.allclose(x, wanted)
