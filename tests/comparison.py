"""Comparison of an idle model with the paper's masked form, for the tests of every model family."""

from __future__ import annotations

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
