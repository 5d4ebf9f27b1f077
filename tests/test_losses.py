"""The training losses equal their formulas written out with dense masks, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_equal, assert_equal_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from vits import MODELS, make

import idlevit_kernels as ik
from idlevit_kernels.ops.reference.masked_form import masked_form

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
    assert_equal_gradients(found_grads, wanted_grads)


def output(**kwargs: Any) -> ik.IdleViTOutput:
    default = {
        "logits": torch.randn(2, 7),
        "features": torch.randn(2, 8),
        "token_cut": torch.rand(3),
        "indices": (torch.zeros(2, 4, dtype=torch.int64),),
    }
    return ik.IdleViTOutput(**(default | kwargs))


def test_weights_of_zero_leave_their_terms_out() -> None:
    targets, out = torch.tensor([1, 2]), output()
    base = nn.CrossEntropyLoss(label_smoothing=0.1)
    total, parts = ik.IdleViTLoss(base, cut_weight=0, distill_weight=0)(out, targets)
    assert torch.equal(total, base(out.logits, targets)) and list(parts) == ["classification"]
    total, parts = ik.IdleViTLoss(base, cut_weight=3, distill_weight=0)(out, targets)
    assert torch.equal(total, base(out.logits, targets) + 3 * out.token_cut.mean())
    _, parts = ik.IdleViTLoss(base, feature_weight=0)(out, targets, output())
    assert list(parts) == ["classification", "token_cut", "logits"]
    _, parts = ik.IdleViTLoss(base)(out, targets, output())
    assert list(parts) == ["classification", "token_cut", "logits", "features"]


def test_no_state() -> None:
    criterion = ik.IdleViTLoss(nn.CrossEntropyLoss())
    before = dict(vars(criterion))
    criterion(output(), torch.tensor([1, 2]), output())
    assert vars(criterion) == before and not criterion.state_dict()


def test_half_types_are_compared_in_float32() -> None:
    """Logits of a thousand classes: a KL divergence in bfloat16 would have two digits."""
    student, teacher = (output(logits=torch.randn(2, 1000).bfloat16()) for _ in range(2))
    criterion = ik.IdleViTLoss(nn.CrossEntropyLoss(), cut_weight=0)
    _, parts = criterion(student, torch.tensor([1, 2]), teacher)
    p, q = student.logits.double().softmax(-1), teacher.logits.double().softmax(-1)
    torch.testing.assert_close(parts["logits"].double(), (q * (q / p).log()).sum(-1).mean(), rtol=1e-5, atol=0)


def test_the_loss_does_not_wait_for_the_device() -> None:
    """Its values are never read: on a device that has none, it runs."""
    move = {"device": "meta"}
    out = output(logits=torch.randn(2, 7, **move), features=torch.randn(2, 8, **move), token_cut=torch.rand(3, **move))
    total, parts = ik.IdleViTLoss(nn.CrossEntropyLoss())(out, torch.zeros(2, dtype=torch.int64, **move), out)
    assert total.is_meta and all(part.is_meta for part in parts.values())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"base_criterion": None}, "IdleViTLoss: base_criterion must be a module or function, got NoneType"),
        ({"cut_weight": "20"}, "IdleViTLoss: cut_weight must be a number, got str '20'"),
        ({"cut_weight": -1.0}, "IdleViTLoss: cut_weight must be a finite number >= 0, got -1.0"),
        ({"distill_weight": float("nan")}, "IdleViTLoss: distill_weight must be a finite number >= 0, got nan"),
        ({"feature_weight": float("inf")}, "IdleViTLoss: feature_weight must be a finite number >= 0, got inf"),
    ],
)
def test_bad_weights(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ik.IdleViTLoss(**({"base_criterion": nn.CrossEntropyLoss()} | kwargs))


@pytest.mark.parametrize(
    "out, teacher, message",
    [
        (torch.randn(2, 7), None, "out must be the output of IdleViTForTraining, got .*float32"),
        (output(token_cut=torch.zeros(0)), output(), r"out.token_cut must be \[L\] with L >= 1 idle layers"),
        (output(), None, "teacher must be the output of .* as distill_weight > 0 .*, got NoneType"),
        (output(), torch.randn(2, 7), "teacher must be the output of"),
        (output(), output(logits=torch.randn(2, 9)), r"teacher.logits must be \[2, 7\] like the student's"),
        (output(), output(features=torch.randn(2, 9)), r"teacher.features must be \[2, 8\] like the student's"),
    ],
)
def test_bad_outputs(out: Any, teacher: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ik.IdleViTLoss(nn.CrossEntropyLoss())(out, torch.tensor([1, 2]), teacher)
