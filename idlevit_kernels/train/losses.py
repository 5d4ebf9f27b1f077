"""The training loss of an IdleViT (arXiv 2310.05654, section 3.4): classification, token cut and distillation.

total = base + cut_weight * mean_l cut_l + distill_weight * (KL(student || teacher) + feature_weight * MSE(features))

with cut_l the token cut loss of idle layer l (``token_cut_loss``), and as teacher the same model, dense and frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import type_error, value_error
from ..models.training import IdleViTOutput
from ..ops.checks import check_number
from ..ops.dtypes import accumulate_dtype
from ..ops.library import ops


class IdleViTLoss(nn.Module):
    """Classification, token cut and distillation losses of an IdleViT. No state, no print, no wait for the device.

    Terms, on the logits z and features f of student and teacher (defaults: the command of the authors' release; flags
    that are not given there have cut_weight 10 and distill_weight 5):

    - classification: ``base_criterion(z, targets)``.
    - token_cut: ``token_cut.mean()`` over all idle layers.
    - logits: ``kl_div(log_softmax(z), log_softmax(z_teacher), reduction="batchmean", log_target=True)``, that is the
      mean over images of sum_c p_teacher (log p_teacher - log p).
    - features: ``mse_loss(normalize(f), normalize(f_teacher))`` with every feature vector scaled to length 1 over its
      channels. The release scales token features [B, T, C] over the token axis instead, which is left out here.

    A pair of logits (class head, distillation head): the first meets the targets and the second the teacher, as in
    DeiT (arXiv 2012.12877); a teacher's pair is averaged.

    Args:
        base_criterion: (logits, targets) -> scalar: ``nn.CrossEntropyLoss(label_smoothing=0.1)``, or timm's
            ``SoftTargetCrossEntropy`` where mixup or cutmix made the targets soft.
        cut_weight: of the token cut loss; with 0 give the model ``cut="none"``, or it computes what nobody reads.
        distill_weight: of both distillation terms; with 0 there is no teacher.
        feature_weight: of the feature term, times distill_weight.

    Raises:
        TypeError, ValueError: a criterion that is not callable; a weight that is no number, or negative.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Any], Tensor],
        cut_weight: float = 20.0,
        distill_weight: float = 10.0,
        feature_weight: float = 100.0,
    ):
        super().__init__()
        if not callable(base_criterion):
            raise type_error("IdleViTLoss", "base_criterion", "a module or function", base_criterion)
        weights = {"cut_weight": cut_weight, "distill_weight": distill_weight, "feature_weight": feature_weight}
        for name, weight in weights.items():
            check_number("IdleViTLoss", name, weight)
            if not 0 <= weight < float("inf"):
                raise value_error("IdleViTLoss", name, "a finite number >= 0", weight)
        self.base_criterion = base_criterion
        self.cut_weight, self.distill_weight, self.feature_weight = cut_weight, distill_weight, feature_weight

    def forward(
        self, out: IdleViTOutput, targets: Any, teacher: IdleViTOutput | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its parts.

        Args:
            out: of the student.
            targets: what ``base_criterion`` takes.
            teacher: of the dense teacher on the same images, made without gradients; None if distill_weight is 0.

        Returns:
            The total, a scalar, and the terms whose weight is not 0, unweighted, detached and still on the device:
            "classification", "token_cut", "logits", "features".

        Raises:
            TypeError, ValueError: an output that does not fit; the message says which and why.
        """
        if not isinstance(out, IdleViTOutput):
            raise type_error("IdleViTLoss", "out", "the output of IdleViTForTraining", out)
        logits = out.logits[0] if isinstance(out.logits, tuple) else out.logits
        total = self.base_criterion(logits, targets)
        parts = {"classification": total.detach()}
        if self.cut_weight:
            if out.token_cut.dim() != 1 or not out.token_cut.numel():
                raise value_error(
                    "IdleViTLoss",
                    "out.token_cut",
                    "[L] with L >= 1 idle layers where cut_weight > 0 (apply_idle makes a model idle)",
                    out.token_cut,
                )
            cut = out.token_cut.mean()
            total = total + self.cut_weight * cut
            parts["token_cut"] = cut.detach()
        if self.distill_weight:
            if not isinstance(teacher, IdleViTOutput):
                expected = "the output of IdleViTForTraining(dense_model), as distill_weight > 0 (0 trains without)"
                raise type_error("IdleViTLoss", "teacher", expected, teacher)
            loss = _logits_loss(out.logits, teacher.logits)
            total = total + self.distill_weight * loss
            parts["logits"] = loss.detach()
            if self.feature_weight:
                loss = _feature_loss(out, teacher)
                total = total + self.distill_weight * self.feature_weight * loss
                parts["features"] = loss.detach()
        return total, parts

    def extra_repr(self) -> str:
        return (
            f"cut_weight={self.cut_weight:g}, distill_weight={self.distill_weight:g},"
            f" feature_weight={self.feature_weight:g}"
        )


def _wide(x: Tensor) -> Tensor:
    """Half types to float32: autocast's outputs may be either."""
    return x.to(accumulate_dtype(x.dtype))


def _logits_loss(student: Tensor | tuple[Tensor, Tensor], teacher: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    student = student[1] if isinstance(student, tuple) else student
    teacher = (teacher[0] + teacher[1]) / 2 if isinstance(teacher, tuple) else teacher
    if teacher.shape != student.shape:
        raise value_error("IdleViTLoss", "teacher.logits", f"{list(student.shape)} like the student's", teacher)
    log_p, log_teacher = (_wide(logits).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(log_p, log_teacher, reduction="batchmean", log_target=True)


def _feature_loss(out: IdleViTOutput, teacher: IdleViTOutput) -> Tensor:
    student, wanted = out.features, teacher.features
    if wanted.shape != student.shape:
        raise value_error("IdleViTLoss", "teacher.features", f"{list(student.shape)} like the student's", wanted)
    if student.dim() == 3 and out.indices:
        student, wanted = (ops.gather_tokens.call(f, out.indices[-1]) for f in (student, wanted))
    return F.mse_loss(F.normalize(_wide(student), dim=-1), F.normalize(_wide(wanted), dim=-1))
