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

from ..ops.dtypes import accumulate_dtype
from ..ops.library import Calls, calls_for, calls_with, direct
from .context import Context
from .parts import Parts
from .scoring import Selection

NO_TORCHSCRIPT = (
    "IdleBlock: TorchScript (torch.jit.script, torch.jit.trace) is not supported; use torch.export, torch.compile or"
    " `idlevit export`, or remove_idle first"
)


class IdleOutput(NamedTuple):
    """What an idle block returns when it is asked for more than tokens.

    Attributes:
        tokens: [B, T, C].
        indices: of the computed tokens, [B, P + K] int64, ascending.
        token_cut: the token cut loss, a scalar; None if it was not asked for.
    """

    tokens: Tensor
    indices: Any
    token_cut: Tensor | None


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
    if num_keep == x.shape[1] - num_prefix_tokens:
        out = _dense(x, parts, context)
        return all_kept(x, x.copy_(out) if inplace else out, cut)

    calls = calls_for(x, backend)
    if not calls.direct:
        _refuse_torchscript()
    measured = cut is not None and cut != "none"
    indices, y, prepared = choose(x, parts, num_keep, num_prefix_tokens, selection, context, measured, calls)
    token_cut = None if cut is None else nothing_cut(x)
    if cut is not None and measured:
        token_cut = parts.attention.cut(prepared, indices, num_prefix_tokens, cut, calls)
    if context is not Context.NOTHING:
        context = context.take(indices, num_prefix_tokens)
    if prepared is None:
        branch = parts.attention(y, context)  # [B, n, C]
    else:
        branch = parts.attention.among(y, prepared, indices, context, calls)

    branch1, branch2, norm2 = parts.branch1, parts.branch2, parts.norm2
    branch, gamma, factor = branch if branch1.bare else branch1(branch, context), branch1.gamma, branch1.factor
    calls = calls_with(calls, branch, backend)
    if norm2 is not None and norm2.plain and norm2.parameters is not None:
        tokens, y = calls.gather_add_norm(x, indices, branch, gamma, factor, *norm2.parameters)
    else:
        branch = branch if gamma is None else gamma * branch
        tokens = torch.add(calls.gather_tokens(x, indices), branch, alpha=factor)
        y = tokens if norm2 is None else norm2(tokens)
    branch = parts.mlp(y)  # [B, n, C]

    branch, gamma, factor = branch if branch2.bare else branch2(branch, context), branch2.gamma, branch2.factor
    calls = calls_with(calls, branch, backend)
    if inplace:
        calls.scatter_add_tokens_(x, indices, tokens, branch, gamma, factor)
        return IdleOutput(x, indices, token_cut)
    out = calls.scatter_add_tokens(x, indices, tokens, branch, gamma, factor)
    return IdleOutput(out, indices, token_cut)


def _dense(x: Tensor, parts: Parts, context: Context) -> Tensor:
    """The block on all tokens: nothing to score, gather or scatter."""
    ordinary = direct(x)
    if not ordinary:
        _refuse_torchscript()
    y = x if parts.norm1 is None else parts.norm1(x)
    y = context.zero_padding(y, None) if context.pads else y
    x = parts.branch1.add(x, parts.attention(y, context), context)
    norm2 = parts.norm2
    y = x if norm2 is None else norm2(x)
    owned = ordinary and norm2 is not None and norm2.plain  # nobody else was given x
    return parts.branch2.add(x, parts.mlp(y), context, owned)


def _refuse_torchscript() -> None:
    if torch.jit.is_tracing():
        raise RuntimeError(NO_TORCHSCRIPT)


def all_kept(x: Tensor, tokens: Tensor, cut: str | None) -> IdleOutput:
    """What a layer without idle tokens returns for x."""
    return IdleOutput(tokens, None, None if cut is None else nothing_cut(x))


def with_indices(out: IdleOutput, num_tokens: int) -> IdleOutput:
    """With those of all tokens, if none idles; ``num_tokens`` T of each row."""
    if out.indices is not None:
        return out
    tokens = out.tokens
    rows = tokens.numel() // max(1, num_tokens * tokens.shape[-1])  # windows of a grid, too
    return out._replace(indices=torch.arange(num_tokens, device=tokens.device).expand(rows, -1))


def nothing_cut(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=accumulate_dtype(x.dtype))


def choose(
    x: Tensor,
    parts: Parts,
    num_keep: int,
    num_prefix_tokens: int,
    selection: Selection,
    context: Context,
    measured: bool,
    calls: Calls,
) -> tuple[Tensor, Tensor, Any]:
    """Scores all tokens and keeps the best: their indices [B, n], norm1 of them [B, n, C], and what the attention has
    of all tokens already, or None. ``measured``: the cut loss will want queries and keys of all tokens.

    Each module is called once: a norm or projection whose formula is not known on all tokens, of which the kept ones
    are gathered; one whose formula is known scores by its parameters and is called on the kept tokens.
    """
    norm, attention, scorer = parts.norm1, parts.attention, selection.scorer
    readable = norm is not None and norm.parameters is not None
    if norm is not None and norm.parameters is not None and norm.plain and not measured and not selection.own:
        front = attention.front(scorer, context)
        if front is not None:
            indices, y = calls.cls_select_gather_norm(x, num_keep, num_prefix_tokens, *norm.parameters, *front)
            return indices, y, None

    prepares = measured or (not selection.own and attention.needs_all(context))
    normed = prepared = None
    if prepares or not readable:
        normed = x if norm is None else norm(x)
        normed = context.zero_padding(normed, None) if context.pads else normed
        normed = normed.resolve_neg()
        prepared = attention.prepare(normed, context) if prepares else None
    with torch.no_grad():  # selection has no gradient
        if selection.own:
            scores = selection.scores(x, parts.block(), num_keep, num_prefix_tokens)
            scores = context.padding_last(scores) if context.pads else scores
        else:
            scores = _scores(x, parts, scorer, context, normed, prepared, calls)

    if normed is None and norm is not None and norm.parameters is not None and norm.plain:
        indices, y = calls.select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm.parameters)
        return indices, context.zero_padding(y, indices) if context.pads else y, prepared
    indices = calls.select_tokens(scores, num_keep, num_prefix_tokens)
    if normed is not None:
        return indices, calls.gather_tokens(normed, indices), prepared
    assert norm is not None
    y = norm(calls.gather_tokens(x, indices))
    return indices, context.zero_padding(y, indices) if context.pads else y, prepared


def _scores(
    x: Tensor, parts: Parts, scorer: str, context: Context, normed: Tensor | None, prepared: Any, calls: Calls
) -> Tensor:
    """[B, T]; normed is norm1 of all tokens, if it had to be called on them."""
    norm, attention = parts.norm1, parts.attention
    if norm is not None and norm.parameters is not None:
        front = attention.front(scorer, context)
        if front is not None:
            u = calls.cls_direction(x, *norm.parameters, *front)
            return calls.token_scores(x, u, *norm.parameters)

        def queries() -> Tensor:
            if scorer == "cls":
                return norm.read()(x[:, 0])
            return (norm.read()(x) if normed is None else normed).mean(1)

        u = attention.direction(scorer, context, queries)
        if u is not None:
            return calls.token_scores(x, u, *norm.parameters)
    if normed is None:
        assert norm is not None
        normed = norm.read()(x)
        normed = context.zero_padding(normed, None) if context.pads else normed
    return attention.scores(normed, prepared, scorer, context)
