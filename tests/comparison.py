"""Comparison of an idle model with the paper's masked form, for the tests of every model family."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import idlevit_kernels as ik


def outputs(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A distilled model in training returns two logits."""
    return torch.cat(result) if isinstance(result, tuple) else result


def gradients(model: nn.Module, *outputs: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter, for a loss in which each element of the outputs that have a gradient has its own weight."""
    model.zero_grad()
    weights = (torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs)
    sum((t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: Tensor, wanted: Tensor, what: str, limit: float = 1e-10) -> None:
    error = float((found - wanted).detach().abs().max())
    assert error <= limit * max(1.0, float(wanted.detach().abs().max())), f"{what}: {error:.1e}"


def assert_all_equal(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], limit: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert_equal(other, value, name, limit)


def check_masked_form(
    model: nn.Module,
    image: Tensor,
    schedules: Iterable[list[float]],
    masked_form: Callable[[nn.Module, Tensor, list[float]], Any],
) -> None:
    """Logits and every parameter's gradient of the idle model equal those of ``masked_form`` of the dense one."""
    for schedule in schedules:
        torch.manual_seed(1)  # of stochastic depth
        wanted = outputs(masked_form(model, image, schedule))
        wanted_gradients = gradients(model, wanted)
        ik.apply_idle(model, schedule=schedule)
        for backend in ("cpu", "reference"):
            with ik.use_backend(backend):
                torch.manual_seed(1)
                found = outputs(model(image))
                assert_equal(found, wanted, f"logits on {backend}")
                found_gradients = gradients(model, found)
                with torch.no_grad():
                    torch.manual_seed(1)
                    assert_equal(outputs(model(image)), wanted, f"logits without gradients on {backend}")
            assert_all_equal(found_gradients, wanted_gradients)
        ik.remove_idle(model)


@torch.no_grad()
def check_there_and_back(
    make: Callable[[], nn.Module],
    image: Tensor,
    blocks_of: Callable[[Any], list[nn.Module]],
    names: list[str],
) -> None:
    """Keep ratio 1 is the dense model; making a model idle and dense again changes no weight, buffer, block or output.

    ``make`` returns the same architecture each time; ``names`` are those of its blocks, in order.
    """
    model = make()
    dense, state, blocks = model(image), model.state_dict(keep_vars=True), blocks_of(model)
    buffers = list(model.buffers())
    ik.apply_idle(model, keep_ratio=1.0)
    torch.testing.assert_close(model(image), dense, rtol=1e-5, atol=1e-5)
    ik.remove_idle(model)

    assert ik.apply_idle(model, keep_ratio=0.5) is model
    ratios = zip(names, ik.idle_schedule(len(names), 0.5), strict=True)
    assert {n: b.keep_ratio for n, b in ik.idle_blocks(model).items()} == {n: r for n, r in ratios if r < 1}
    idle = model(image)
    assert idle.isfinite().all() and not torch.allclose(idle, dense)
    found = model.state_dict(keep_vars=True)
    assert list(found) == list(state) and all(found[key] is state[key] for key in state)
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(image), idle)
        assert torch.equal(ik.remove_idle(again)(image), dense)
    other = ik.apply_idle(make(), keep_ratio=0.5)
    other.load_state_dict(ik.remove_idle(model).state_dict(), strict=True)  # dense into idle
    assert torch.equal(other(image), idle)
    model.load_state_dict(other.state_dict(), strict=True)  # and back
    assert blocks_of(model) == blocks and torch.equal(model(image), dense)
