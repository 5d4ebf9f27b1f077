"""The idle block: score, select, gather, attend, MLP, scatter (arXiv 2310.05654, section 3). The formula stands here.

K of the N image tokens of each image, and all prefix tokens, go through attention and MLP in a compact buffer; all
others pass to the output unchanged, at their old place. This equals the paper's training form (full attention with idle
keys masked, both branches multiplied by the 0/1 mask) in value and in gradient, so training runs compact as well. All
kept is the dense block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reference.layer_norm import accumulate_dtype
from .context import Context
from .parts import Parts
from .scoring import Selection


class IdleOutput(NamedTuple):
    """What an idle block returns when it is asked for more than tokens.

    Attributes:
        tokens: [B, T, C].
        indices: of the computed tokens, [B, P + K] int64, ascending.
        token_cut: the token cut loss, a scalar; None if it was not asked for.
    """

    tokens: Tensor
    indices: Tensor
    token_cut: Tensor | None


class Kept(NamedTuple):
    """The tokens that a layer computes."""

    indices: Tensor  # [B, n]
    y: Tensor  # norm1 of them, [B, n, C]
    prepared: Any  # what the attention has of all tokens already, or None


def run(
    x: Tensor,
    parts: Parts,
    num_keep: int,
    num_prefix_tokens: int,
    selection: Selection,
    context: Context,
    *,
    inplace: bool = False,
    backend: str = "auto",
    cut: str | None = None,
) -> IdleOutput:
    """One block on the tokens x [B, T, C]: K = ``num_keep`` image tokens of each row are computed, the others idle."""
    images = context.images(x)
    if num_keep == x.shape[1] - num_prefix_tokens:
        out = _dense(x, parts, context, images)
        nothing_cut = None if cut is None else x.new_zeros((), dtype=accumulate_dtype(x.dtype))
        return IdleOutput(x.copy_(out) if inplace else out, _all_indices(x), nothing_cut)

    measured = cut not in (None, "none")
    indices, y, prepared = choose(x, parts, num_keep, num_prefix_tokens, selection, context, measured, backend)
    token_cut = None if cut is None else x.new_zeros((), dtype=accumulate_dtype(x.dtype))
    if cut is not None and measured:
        token_cut = parts.attention.cut(prepared, indices, num_prefix_tokens, cut, backend)
    context = context.take(indices, num_prefix_tokens)
    if prepared is None:
        branch = parts.attention(y, context)  # [B, n, C]
    else:
        branch = parts.attention.among(y, prepared, indices, context, backend)

    branch, gamma, factor = parts.branch1(branch, images), parts.branch1.gamma, parts.branch1.factor
    norm2 = parts.norm2
    if norm2 is not None and norm2.plain and norm2.parameters is not None:
        tokens, y = ops.gather_add_norm(x, indices, branch, gamma, factor, *norm2.parameters, backend=backend)
    else:
        branch = branch if gamma is None else gamma * branch
        tokens = torch.add(ops.gather_tokens(x, indices, backend=backend), branch, alpha=factor)
        y = tokens if norm2 is None else norm2(tokens)
    branch = parts.branch2(parts.mlp(y), images)  # [B, n, C]

    gamma, factor = parts.branch2.gamma, parts.branch2.factor
    if inplace:
        ops.scatter_add_tokens_(x, indices, tokens, branch, gamma, factor, backend=backend)
        return IdleOutput(x, indices, token_cut)
    out = ops.scatter_add_tokens(x, indices, tokens, branch, gamma, factor, backend=backend)
    return IdleOutput(out, indices, token_cut)


def _dense(x: Tensor, parts: Parts, context: Context, images: int) -> Tensor:
    """The block on all tokens: nothing to score, gather or scatter."""
    y = x if parts.norm1 is None else context.zero_padding(parts.norm1(x), None)
    x = parts.branch1.add(x, parts.attention(y, context), images)
    norm2 = parts.norm2
    y = x if norm2 is None else norm2(x)
    owned = norm2 is not None and norm2.plain and ops.direct(x)  # nobody else was given x
    return parts.branch2.add(x, parts.mlp(y), images, owned)


def _all_indices(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def choose(
    x: Tensor,
    parts: Parts,
    num_keep: int,
    num_prefix_tokens: int,
    selection: Selection,
    context: Context,
    measured: bool,
    backend: str,
) -> Kept:
    """Scores all tokens and keeps the best; ``measured``: the cut loss will want queries and keys of all tokens.

    Each module is called once: a norm or projection whose formula is not known on all tokens, of which the kept ones
    are gathered; one whose formula is known scores by its parameters and is called on the kept tokens.
    """
    norm, attention, scorer = parts.norm1, parts.attention, selection.scorer
    readable = norm is not None and norm.parameters is not None
    prepares = measured or (not selection.own and attention.needs_all(context))
    if norm is not None and norm.parameters is not None and norm.plain and not prepares and not selection.own:
        front = attention.front(scorer, context)
        if front is not None:
            found = ops.cls_select_gather_norm(
                x, num_keep, num_prefix_tokens, *norm.parameters, *front, backend=backend
            )
            return Kept(*found, None)

    normed = prepared = None
    if prepares or not readable:
        normed = x if norm is None else context.zero_padding(norm(x), None)
        prepared = attention.prepare(normed, context) if prepares else None
    with torch.no_grad():  # selection has no gradient
        if selection.own:
            scores = selection.scores(x, num_keep, num_prefix_tokens)
        else:
            scores = _scores(x, parts, scorer, context, normed, prepared, backend)

    if normed is None and norm is not None and norm.parameters is not None and norm.plain:
        indices, y = ops.select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm.parameters, backend=backend)
        return Kept(indices, context.zero_padding(y, indices), prepared)
    indices = ops.select_tokens(scores, num_keep, num_prefix_tokens, backend=backend)
    if normed is not None:
        return Kept(indices, ops.gather_tokens(normed, indices, backend=backend), prepared)
    assert norm is not None
    y = norm(ops.gather_tokens(x, indices, backend=backend))
    return Kept(indices, context.zero_padding(y, indices), prepared)


def _scores(
    x: Tensor, parts: Parts, scorer: str, context: Context, normed: Tensor | None, prepared: Any, backend: str
) -> Tensor:
    """[B, T]; normed is norm1 of all tokens, if it had to be called on them."""
    norm, attention = parts.norm1, parts.attention
    if norm is not None and norm.parameters is not None:
        front = attention.front(scorer, context)
        if front is not None:
            u = ops.cls_direction(x, *norm.parameters, *front, backend=backend)
            return ops.token_scores(x, u, *norm.parameters, backend=backend)

        def queries() -> Tensor:
            if scorer == "cls":
                return norm.formula(x[:, 0])
            return (norm.formula(x) if normed is None else normed).mean(1)

        u = attention.direction(scorer, context, queries)
        if u is not None:
            return ops.token_scores(x, u, *norm.parameters, backend=backend)
    if normed is None:
        assert norm is not None
        normed = context.zero_padding(norm.formula(x), None)
    return attention.scores(normed, prepared, scorer, context)
