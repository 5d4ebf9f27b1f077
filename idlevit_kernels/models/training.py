"""A model as its training loss sees it: logits, features, token cut losses and selections."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..block import IdleBlock
from ..errors import ArgumentTypeError, type_error, value_error
from ..ops.dtypes import accumulate_dtype
from ..ops.reference.token_cut_loss import ROW_WEIGHTS
from .apply import find_encoders


class IdleViTOutput(NamedTuple):
    """What ``IdleViTForTraining`` returns and ``IdleViTLoss`` reads. B images, L idle layers.

    Attributes:
        logits: [B, classes]; the pair (class head, distillation head) of a distilled model in distilled training.
        features: what the classifier reads, before it: [B, C]; or, in families that classify from every token,
            all normalised tokens [B, T, C], of which the loss compares those that the last idle layer kept.
        token_cut: [L], the token cut loss of each idle layer, float32 (float64 in a float64 model).
        indices: of each idle layer, the tokens that it computed, [B, n] int64.
    """

    logits: Tensor | tuple[Tensor, Tensor]
    features: Tensor
    token_cut: Tensor
    indices: tuple[Tensor, ...]


class IdleViTForTraining(nn.Module):
    """Runs a model and returns an ``IdleViTOutput``, which ``IdleViTLoss`` reads.

    ``wrapped.model`` is the model itself, with its state-dict keys; evaluate and save that one. A dense model is
    the teacher: no idle layer, so ``token_cut`` is empty. Every result travels as a return value of its block, nothing
    is stored on a module: so DistributedDataParallel and FSDP2 see all outputs that gradients come from, activation
    checkpointing (timm's ``set_grad_checkpointing``, one block a segment, non-reentrant) can run a block twice, and
    torch.compile finds no side effect.

    Args:
        model: as ``apply_idle`` takes and returns it, with its classifier.
        cut: kind of ``token_cut_loss``: "both", "inter", "intra"; "none" computes nothing of it, and the losses are 0.

    Raises:
        TypeError, ValueError: an unsupported model or kind; the message names it.
    """

    def __init__(self, model: nn.Module, cut: str = "both"):
        super().__init__()
        (encoder, *others) = find_encoders("IdleViTForTraining", model)
        family: Any = encoder.family
        if not hasattr(family, "embed") or not hasattr(family, "head"):
            raise ArgumentTypeError(
                f"IdleViTForTraining: {family.name} has no training form; got {type(model).__name__}."
                " Train it as the dense model is trained, without the token cut loss."
            )
        if encoder.place is not model or others:
            expected = "a model with its classifier, not features_only or wrapped in another"
            raise type_error("IdleViTForTraining", "model", expected, model)
        if cut not in ROW_WEIGHTS:
            raise value_error("IdleViTForTraining", "cut", f"one of {list(ROW_WEIGHTS)}", cut)
        self.model, self.cut = model, cut
        self._family = family

    def forward(self, images: Tensor) -> IdleViTOutput:
        model: Any = self.model
        recompute = getattr(model, "grad_checkpointing", False) and torch.is_grad_enabled()

        def run(block: nn.Module, x: Tensor, **kwargs: Any) -> Any:
            return checkpoint(block, x, use_reentrant=False, **kwargs) if recompute else block(x, **kwargs)

        x, arguments = self._family.embed(model, images)
        token_cut, indices = [], []
        for block, kwargs in zip(self._family.blocks(model), arguments, strict=True):
            if isinstance(block, IdleBlock) and block.idles:
                x, kept, cut = run(block, x, return_cut=self.cut, **kwargs)
                token_cut.append(cut)
                indices.append(kept)
            else:
                x = run(block, x, **kwargs)
        logits, features = self._family.head(model, x)
        cuts = torch.stack(token_cut) if token_cut else x.new_zeros(0, dtype=accumulate_dtype(x.dtype))
        return IdleViTOutput(logits, features, cuts, tuple(indices))

    def extra_repr(self) -> str:
        return f"cut={self.cut!r}"
