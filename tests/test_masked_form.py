"""The compact form equals the paper's training form (arXiv 2310.05654, section 3), in value and in gradient.

That form is written out in ``idlevit_kernels/ops/reference/masked_form.py``.
"""

from __future__ import annotations

import pytest
import torch
from comparison import assert_equal, check_masked_form
from torch import Tensor, nn
from vits import MODELS, make

import idlevit_kernels as ik
import idlevit_kernels.models.lvvit  # noqa: F401
from idlevit_kernels.ops.reference import masked_form as reference

pytestmark = pytest.mark.usefixtures("one_thread")


def masked_form(model: nn.Module, image: Tensor, schedule: list[float], scorer: str) -> Tensor:
    return reference.masked_form(model, image, schedule, scorer)[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name, ratio",
    [
        (name, ratio)
        for name in MODELS
        for ratio in ([0.9, 0.7, 0.5, 0.3] if name in ("tiny", "distilled") else [0.7, 0.3])
    ],
)
def test_logits_and_all_gradients(name: str, ratio: float, training: bool) -> None:
    model = make(name).train(training)
    image = torch.randn(3, 3, *model.patch_embed.img_size, dtype=torch.float64)
    schedule = ik.idle_schedule(len(model.blocks), ratio)
    scorer = "cls" if model.has_class_token else "mean"

    check_masked_form(model, image, [schedule], lambda *args: masked_form(*args, scorer))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_schedule_that_skips_layers(training: bool) -> None:
    """Tokens that idled in one layer are picked up in a later one."""
    model = make("tiny").train(training)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    schedule = [0.25, 1.0, 0.5, 0.1]
    torch.manual_seed(1)
    wanted = masked_form(model, image, schedule, "mean")
    torch.manual_seed(1)
    assert_equal(ik.apply_idle(model, schedule=schedule, scorer="mean")(image), wanted, "logits")


def test_float32() -> None:
    model = make("deit, 12 layers").eval()
    image = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        wanted = masked_form(model, image.double(), ik.idle_schedule(12, 0.7), "cls")
        found = ik.apply_idle(model.float(), keep_ratio=0.7)(image)
    assert float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)) <= 1e-4


def test_this_comparison_can_fail() -> None:
    """Selection matters: another scorer gives other logits."""
    model = make("tiny").eval()
    image = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    wanted = masked_form(model, image, ik.idle_schedule(4, 0.5), "mean")
    with pytest.raises(AssertionError, match="^logits"):
        assert_equal(ik.apply_idle(model, keep_ratio=0.5)(image), wanted, "logits")
