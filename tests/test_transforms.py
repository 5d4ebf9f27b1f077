"""torch.func, forward-mode AD and batched gradients of idle models: selection is a constant, all else is smooth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import SEQUENCES, image_for, make, run
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import idlevit_kernels as ik

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "ignore::FutureWarning"),
]
each_family = pytest.mark.parametrize("family", SEQUENCES)
each_ratio = pytest.mark.parametrize("ratio", [1.0, 0.5])


def model_of(family: str, ratio: float, trainable: bool = True) -> nn.Module:
    model = make(family).double().requires_grad_(trainable)
    return ik.apply_idle(model, schedule=[ratio] * 2)


@each_family
@each_ratio
@pytest.mark.parametrize("trainable", [False, True])
def test_forward_mode(family: str, ratio: float, trainable: bool) -> None:
    model, x = model_of(family, ratio, trainable), image_for(family).double()
    v = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            wanted = (run(model, x + 1e-6 * v) - run(model, x - 1e-6 * v)) / 2e-6
        for tangent in (jvp(lambda x: run(model, x), (x,), (v,))[1], _dual(model, x, v)):
            torch.testing.assert_close(tangent.detach(), wanted, rtol=1e-5, atol=1e-6)
    assert wanted.norm() > 0


def _dual(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = run(model, torch.autograd.forward_ad.make_dual(x, v))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


@each_family
@each_ratio
def test_gradients_by_torch_func(family: str, ratio: float) -> None:
    model, x = model_of(family, ratio), image_for(family).double()
    parameters = dict(model.named_parameters())
    run(model, x).square().sum().backward()
    wanted = {name: p.grad for name, p in parameters.items()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(model, p, (x,))
        return (out if isinstance(out, Tensor) else out.last_hidden_state).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    _, pull = vjp(lambda p: loss(p, x), detached)
    for found in (grad(loss)(detached, x), pull(torch.ones((), dtype=x.dtype))[0]):
        for name, g in wanted.items():
            if g is not None:
                torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-9, msg=name)


@each_family
@each_ratio
def test_gradients_of_each_image(family: str, ratio: float) -> None:
    """vmap of grad."""
    model, x = model_of(family, ratio), image_for(family, batch=3).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        out = functional_call(model, p, (image[None],))
        return (out if isinstance(out, Tensor) else out.last_hidden_state).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(3):
            for name, g in grad(loss)(parameters, x[i]).items():
                torch.testing.assert_close(found[name][i], g, rtol=1e-8, atol=1e-8, msg=name)


@each_family
@each_ratio
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_vmap_over_images_and_models(family: str, ratio: float, context: Any) -> None:
    model, x = model_of(family, ratio), image_for(family, batch=3).double()
    with context(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(lambda image: run(model, image[None])[0])(x)
        torch.testing.assert_close(found, run(model, x), rtol=1e-9, atol=1e-9)
        parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(2)])

        def one(p: Any, b: Any) -> Tensor:
            out = functional_call(model, (p, b), (x,))
            return out if isinstance(out, Tensor) else out.last_hidden_state

        for each in vmap(one)(parameters, buffers):
            torch.testing.assert_close(each, run(model, x), rtol=1e-9, atol=1e-9)


@each_ratio
def test_jacobians(ratio: float) -> None:
    model, x = model_of("timm ViT", ratio), image_for("timm ViT", batch=1).double()

    def f(x: Tensor) -> Tensor:
        return run(model, x)[0, :2]

    wanted = torch.autograd.functional.jacobian(f, x)
    for found in (torch.autograd.functional.jacobian(f, x, vectorize=True), jacrev(f)(x)):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@each_ratio
def test_hessian_of_few_values(ratio: float) -> None:
    """Forward over reverse, through the references."""
    model, x = model_of("timm ViT", ratio), image_for("timm ViT", batch=1).double()
    delta = torch.randn(2, *x.shape, dtype=x.dtype)

    def f(a: Tensor) -> Tensor:
        return run(model, x + (a[:, None, None, None, None] * delta).sum(0)).square().sum()

    at = torch.zeros(2, dtype=x.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        found = hessian(f)(at)
        step = 1e-5
        columns = [(grad(f)(at + step * e) - grad(f)(at - step * e)) / (2 * step) for e in torch.eye(2, dtype=x.dtype)]
    torch.testing.assert_close(found, torch.stack(columns, 1), rtol=1e-4, atol=1e-4)


def test_single_ops() -> None:
    x, indices = torch.randn(2, 7, 8, dtype=torch.float64), torch.tensor([[0, 2], [0, 3]])
    v = torch.randn_like(x)
    rows = indices[..., None].expand(-1, -1, 8)
    out, tangent = jvp(lambda x: ik.gather_tokens(x, indices), (x,), (v,))
    assert torch.equal(out, x.gather(1, rows)) and torch.equal(tangent, v.gather(1, rows))
    found = grad(lambda x: ik.gather_tokens(x, indices).square().sum())(x)
    assert torch.equal(found, torch.zeros_like(x).scatter(1, rows, 2 * x.gather(1, rows)))
    found = vmap(lambda x, i: ik.gather_tokens(x[None], i[None])[0])(x, indices)
    assert torch.equal(found, x.gather(1, rows))
