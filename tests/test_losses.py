"""The training losses equal their formulas written out with dense masks, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_masked_form import MODELS, assert_equal, make
from torch import Tensor, nn
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.reference.masked_form import masked_form

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("both", "inter", "intra", "none")


def plain_total(
    logits: Any, features: Tensor, cut: Tensor, targets: Tensor, taught: Tensor, taught_features: Tensor
) -> Tensor:
    """Section 3.4 of the paper with the release's weights, as sums."""
    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    p, q = second.softmax(-1), taught.softmax(-1)
    f, g = (t / t.norm(dim=-1, keepdim=True) for t in (features, taught_features))
    total = F.cross_entropy(first, targets) + 20 * cut.sum() / len(cut)
    return total + 10 * (q * (q / p).log()).sum(-1).mean() + 1000 * ((f - g) ** 2).mean()


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def features_of(model: nn.Module, normed: Tensor, mask: Tensor) -> Tensor:
    if hasattr(model, "aux_head"):  # LV-ViT: the kept tokens
        return normed[mask.bool()]
    return normed[:, 0] if hasattr(model, "head_dist") else model.forward_head(normed, pre_logits=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_total_and_all_gradients_equal_the_masked_form(name: str, kind: str) -> None:
    model = make(name).train()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training()
    images = torch.randn(3, 3, *model.patch_embed.img_size, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3])
    ratios = ik.idle_schedule(len(model.blocks), 0.6)
    teacher = ik.IdleViTForTraining(make(name)).eval()
    with torch.no_grad():
        taught = teacher(images)

    torch.manual_seed(1)  # of stochastic depth
    scorer = "cls" if model.has_class_token else "mean"
    logits, normed, cut, mask = masked_form(model, images, ratios, scorer, kind)
    taught_features = taught.features[mask.bool()] if taught.features.dim() == 3 else taught.features
    wanted = plain_total(logits, features_of(model, normed, mask), cut, targets, taught.logits, taught_features)
    wanted_grads = gradients(model, wanted)

    wrapped = ik.IdleViTForTraining(ik.apply_idle(model, keep_ratio=0.6), cut=kind)
    criterion = ik.IdleViTLoss(nn.CrossEntropyLoss(), cut_weight=20.0, distill_weight=10.0)
    torch.manual_seed(1)
    out = wrapped(images)
    found, parts = criterion(out, targets, taught)
    assert_equal(out.token_cut, cut, "token cut losses")
    assert_equal(found, wanted, "total loss")
    assert_equal(
        parts["classification"] + 20 * parts["token_cut"] + 10 * parts["logits"] + 1000 * parts["features"],
        wanted,
        "sum of the parts",
    )
    assert not any(part.requires_grad for part in parts.values())
    found_grads = gradients(model, found)
    for key, grad in wanted_grads.items():
        assert (grad is None) == (found_grads[key] is None), key
        if grad is not None:
            assert_equal(found_grads[key], grad, f"gradient of {key}")
