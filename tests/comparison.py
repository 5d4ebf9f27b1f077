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


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter, for a loss in which each output has its own weight."""
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    limit = 1e-10 * max(1.0, float(wanted.detach().abs().max()))
    error = float((found - wanted).detach().abs().max())
    assert error <= limit, f"{what}: {error:.1e}"


def assert_equal_gradients(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        other = found[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            assert_equal(other, grad, f"gradient of {name}")


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
            assert_equal_gradients(found_gradients, wanted_gradients)
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


def noisy(model: nn.Module) -> nn.Module:
    """Fresh weights are so small that a wrong branch would hardly show."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.02)
    return model
