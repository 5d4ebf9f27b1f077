"""The idle block: score, select, gather, attend, MLP, scatter (arXiv 2310.05654, section 3).

K of the N image tokens of each image, and all prefix tokens, go through attention and MLP in a compact buffer; all
others pass to the output unchanged, at their old place. This equals the paper's training form (full attention with idle
keys masked, both branches multiplied by the 0/1 mask) in value and in gradient, so training runs compact as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import dense, ops
from .backends import resolve
from .errors import type_error, value_error
from .functional import check_counts, check_tensor
from .schedule import check_ratio, num_kept
from .scoring import check_scorer, layer_norm_parameters, score_tokens

_PARTS = ("norm1", "attn", "norm2", "mlp")


def idle_block(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    scorer: str = "auto",
    inplace: bool = False,
    return_indices: bool = False,
    backend: str = "auto",
) -> Any:
    """One pre-norm transformer block on the ``num_keep`` most relevant image tokens; the others idle.

    Equivalent PyTorch, with ``idx`` from the class token's mean attention logits:
    ``y = gather(x, idx); y = y + ls1(attn(norm1(y))); y = y + ls2(mlp(norm2(y))); scatter(x, idx, y)``.

    Args:
        x: tokens [B, T, C], prefix tokens first.
        block: a timm-style pre-norm block with ``norm1``, ``attn`` (with ``qkv``, ``q_norm``, ``k_norm`` and
            ``num_heads``), ``norm2`` and ``mlp``; ``ls1``, ``ls2``, ``drop_path1`` and ``drop_path2`` if it has them.
        num_keep: K, 1 <= K <= N = T - num_prefix_tokens.
        num_prefix_tokens: P; prefix tokens never idle.
        scorer: "cls" (logits of the first token), "mean" (column mean of all logits), "auto" (cls if P > 0).
        inplace: write the result into x. Everything that shares its memory changes; not while gradients are recorded.
        return_indices: also return the indices of the computed tokens, [B, P + K] int64, ascending.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, T, C], or that and the indices. Rows of idle tokens equal those of x bit for bit.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        BackendError: a named backend cannot run the call.
    """
    check_tensor("idle_block", "x", x, "[B, T, C]", (None, None, None))
    check_counts("idle_block", x.shape[1], num_keep, num_prefix_tokens)
    scorer = check_scorer("idle_block", scorer, num_prefix_tokens)
    missing = [name for name in _PARTS if not hasattr(block, name)]
    if missing:
        raise type_error("idle_block", "block", f"a pre-norm block with {', '.join(_PARTS)}", type(block).__name__)
    if inplace and torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        raise value_error("idle_block", "inplace", "False while gradients are recorded (or use torch.no_grad)", inplace)
    out, indices = _idle(x, block, num_keep, num_prefix_tokens, scorer, inplace, resolve(backend))
    return (out, indices) if return_indices else out


def _idle(
    x: Tensor, block: nn.Module, num_keep: int, num_prefix_tokens: int, scorer: str, inplace: bool, backend: str
) -> tuple[Tensor, Tensor]:
    norm1, norm2 = layer_norm_parameters(block.norm1), layer_norm_parameters(block.norm2)  # type: ignore[arg-type]
    scores = score_tokens(x, block, norm1, scorer, backend)  # [B, T]

    if norm1 is not None:
        indices, y = ops.select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm1, backend=backend)
    else:
        indices = ops.select_tokens(scores, num_keep, num_prefix_tokens, backend=backend)  # [B, n]
        y = block.norm1(ops.gather_tokens(x, indices, backend=backend))  # type: ignore[operator]
    branch = dense.attention(block.attn, y, backend)  # type: ignore[arg-type]  # [B, n, C]

    branch, gamma = _scale_and_drop(branch, block, 1)
    if norm2 is not None:
        tokens, y = ops.gather_add_norm(x, indices, branch, gamma, 1.0, *norm2, backend=backend)
    else:
        tokens = ops.gather_tokens(x, indices, backend=backend) + (branch if gamma is None else gamma * branch)
        y = block.norm2(tokens)  # type: ignore[operator]
    branch = dense.mlp(block.mlp, y, backend)  # type: ignore[arg-type]  # [B, n, C]

    branch, gamma = _scale_and_drop(branch, block, 2)
    if inplace:
        ops.scatter_add_tokens_(x, indices, tokens, branch, gamma, 1.0, backend=backend)
        return x, indices
    return ops.scatter_add_tokens(x, indices, tokens, branch, gamma, 1.0, backend=backend), indices


def _scale_and_drop(branch: Tensor, block: nn.Module, i: int) -> tuple[Tensor, Tensor | None]:
    """The branch after stochastic depth, and LayerScale's factor for the fused kernel to apply.

    DropPath multiplies whole images and LayerScale whole channels, so their order does not matter.
    """
    scale = getattr(block, f"ls{i}", None)
    gamma = None
    if type(scale).__name__ == "LayerScale" and not (scale._forward_hooks or scale._forward_pre_hooks):
        gamma = scale.gamma
    elif scale is not None:
        branch = scale(branch)
    drop = getattr(block, f"drop_path{i}", None)
    return branch if drop is None else drop(branch), gamma


class IdleBlock(nn.Module):
    """A transformer block that computes a share of its image tokens and lets the others idle.

    Takes over the sub-modules of ``block`` under their own names, so state-dict keys do not change, and gives the block
    back in ``dense_block``. K follows the number of image tokens of each input: K = int(keep_ratio * N), at least 1.

    Args:
        block: as in ``idle_block``.
        keep_ratio: in (0, 1].
        num_prefix_tokens, scorer: as in ``idle_block``.
    """

    def __init__(self, block: nn.Module, keep_ratio: float, num_prefix_tokens: int = 1, scorer: str = "auto"):
        super().__init__()
        self.keep_ratio = check_ratio("IdleBlock", keep_ratio)
        self.num_prefix_tokens = num_prefix_tokens
        self.scorer = check_scorer("IdleBlock", scorer, num_prefix_tokens)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.train(block.training)
        self._block = (block,)  # in a tuple, so that it is no sub-module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise value_error(
                "IdleBlock", "attn_mask", "None, and is_causal False: idle tokens need full attention", attn_mask
            )
        num_keep = num_kept(self.keep_ratio, x.shape[1] - self.num_prefix_tokens)
        return idle_block(x, self, num_keep, self.num_prefix_tokens, self.scorer)

    def dense_block(self) -> nn.Module:
        """The block this was made from, with the present sub-modules."""
        (block,) = self._block
        for name, child in self.named_children():
            setattr(block, name, child)
        return block.train(self.training)

    def extra_repr(self) -> str:
        return f"keep_ratio={self.keep_ratio:g}, num_prefix_tokens={self.num_prefix_tokens}, scorer={self.scorer!r}"
