"""The public ops: documentation and argument checks around the records of ``reference``.

Shapes: B images, T tokens of which the first P are prefix tokens (class, distillation, registers) and N = T - P are
image tokens, C channels, K kept image tokens, n = P + K. Tokens are float32, float16, bfloat16 or float64; scores,
softmax and norm statistics accumulate in float32 (float64 for float64). Every op takes ``backend``: "auto",
"reference", "cpu", "triton" or "cuda", and raises ``BackendError`` with all reasons if a named one cannot run the call.
Index values are checked on the CPU (ValueError); on a GPU that would wait for the device, so there they are not.
The method is IdleViT, arXiv 2310.05654, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import type_error, value_error
from .backends import resolve
from .checks import (
    check_compact,
    check_counts,
    check_device,
    check_indices,
    check_integer,
    check_norm,
    check_number,
    check_parameter,
    check_same_dtype,
    check_scatter,
    check_tensor,
    check_writable,
)
from .library import ops
from .reference.token_cut_loss import ROW_WEIGHTS

__all__ = [
    "cls_direction",
    "expand_tokens",
    "gather_add_norm",
    "gather_tokens",
    "scatter_add_tokens",
    "scatter_add_tokens_",
    "scatter_tokens",
    "scatter_tokens_",
    "select_gather_norm",
    "select_tokens",
    "token_cut_loss",
    "token_scores",
]


def cls_direction(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The direction that ``token_scores`` takes: the class token's query, through the key projection's transpose.

    Equivalent PyTorch: ``W_q, W_k, _ = qkv_weight.chunk(3)``; ``q = F.linear(LN(x[:, 0]), W_q, b_q)``; ``q @ W_k``.

    Args:
        x: tokens [B, T, C], the class token first.
        norm_weight, norm_bias, eps: the block's first LayerNorm, as in ``token_scores``.
        qkv_weight: [3A, C], rows of queries, keys and values, as in timm's attention; dtype of x.
        qkv_bias: [3A] or None.

    Returns:
        [B, C] of the dtype of x. Not differentiable: selection has no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device or eps that does not fit.
        BackendError: a named backend cannot run the call.
    """
    op = "cls_direction"
    check_tensor(op, "x", x, "[B, T, C]", (None, None, None))
    if x.shape[1] < 1:
        raise value_error(op, "x", "[B, T, C] with T >= 1, the class token first", x)
    check_norm(op, x, norm_weight, norm_bias, eps)
    check_tensor(op, "qkv_weight", qkv_weight, "[3A, C]", (None, x.shape[2]))
    if qkv_weight.shape[0] % 3:
        raise value_error(op, "qkv_weight", "[3A, C], as many rows of queries as of keys and values", qkv_weight)
    check_device(op, "qkv_weight", qkv_weight, x)
    check_same_dtype(op, "qkv_weight", qkv_weight, x)
    if qkv_bias is not None:
        check_tensor(op, "qkv_bias", qkv_bias, "[3A]", (qkv_weight.shape[0],))
        check_device(op, "qkv_bias", qkv_bias, x)
    return ops.cls_direction.call(
        x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, backend=resolve(backend, "cls_direction")
    )


def token_scores(
    x: Tensor,
    direction: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scores every token by one dot product with its image's direction, LayerNorm included, in one pass over x.

    With ``direction`` = W_k^T (W_q LN(x)[:, 0] + b_q) this ranks tokens exactly as the class token's attention logits,
    averaged over heads, do (arXiv 2310.05654, section 3.2): the sum over heads of per-head dot products is one dot
    product over all channels.

    Equivalent PyTorch: ``torch.einsum("btc,bc->bt", F.layer_norm(x, [C], norm_weight, norm_bias, eps), direction)``.

    Args:
        x: tokens [B, T, C]; channels of any stride, a copy is made if they are not contiguous.
        direction: [B, C].
        norm_weight, norm_bias: [C] or None, the block's first LayerNorm.
        eps: of the LayerNorm, > 0.

    Returns:
        [B, T] float32 (float64 if x is float64). Differentiable once in x, direction, norm_weight, norm_bias.

    Raises:
        TypeError, ValueError: a dtype, shape, device or eps that does not fit.
        BackendError: a named backend cannot run the call.
    """
    check_tensor("token_scores", "x", x, "[B, T, C]", (None, None, None))
    check_tensor("token_scores", "direction", direction, "[B, C]", (x.shape[0], x.shape[2]))
    check_device("token_scores", "direction", direction, x)
    check_norm("token_scores", x, norm_weight, norm_bias, eps)
    return ops.token_scores.call(x, direction, norm_weight, norm_bias, eps, backend=resolve(backend, "token_scores"))


def select_tokens(scores: Tensor, num_keep: int, num_prefix_tokens: int = 1, *, backend: str = "auto") -> Tensor:
    """The prefix tokens and, of each image, the ``num_keep`` image tokens with the largest scores, in token order.

    Equal scores go to the lower index (-0 equals +0) and NaN ranks below -inf, so the result is the same on every
    backend and from run to run.

    Equivalent PyTorch: prefix indices, then ``scores[:, P:].topk(num_keep).indices.sort().values + P`` (with the
    rules above, which topk does not promise).

    Args:
        scores: [B, T], any float type. The scores of prefix tokens are not read.
        num_keep: K, 1 <= K <= T - num_prefix_tokens.
        num_prefix_tokens: P, 0 <= P < T.

    Returns:
        [B, P + K] int64, strictly ascending in each image. Not differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape or count that does not fit.
        BackendError: a named backend cannot run the call.
    """
    check_tensor("select_tokens", "scores", scores, "[B, T]", (None, None))
    check_counts("select_tokens", scores.shape[1], num_keep, num_prefix_tokens)
    return ops.select_tokens.call(scores, num_keep, num_prefix_tokens, backend=resolve(backend, "select_tokens"))


def select_gather_norm(
    x: Tensor,
    scores: Tensor,
    num_keep: int,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``select_tokens``, then LayerNorm of the kept tokens only, in a compact buffer.

    Equivalent PyTorch: ``indices = select_tokens(scores, K, P)``;
    ``F.layer_norm(gather_tokens(x, indices), [C], norm_weight, norm_bias, eps)``.

    Args:
        x: [B, T, C].
        scores: [B, T], any float type; float64 only if x is.
        num_keep, num_prefix_tokens: as in ``select_tokens``.
        norm_weight, norm_bias, eps: as in ``token_scores``.

    Returns:
        indices [B, n] int64 and LN(x[indices]) [B, n, C] of the dtype of x. Differentiable once in x and the norm.

    Raises:
        TypeError, ValueError: a dtype, shape, device, count or eps that does not fit.
        BackendError: a named backend cannot run the call.
    """
    op = "select_gather_norm"
    check_tensor(op, "x", x, "[B, T, C]", (None, None, None))
    check_tensor(op, "scores", scores, "[B, T]", (x.shape[0], x.shape[1]))
    if scores.dtype == torch.float64 != x.dtype:  # the kernels compare in the accumulate type of x
        raise type_error(op, "scores", f"at most float32 where x is {x.dtype} (or call select_tokens)", scores)
    check_device(op, "scores", scores, x)
    check_counts(op, x.shape[1], num_keep, num_prefix_tokens)
    check_norm(op, x, norm_weight, norm_bias, eps)
    return ops.select_gather_norm.call(
        x,
        scores,
        num_keep,
        num_prefix_tokens,
        norm_weight,
        norm_bias,
        eps,
        backend=resolve(backend, "select_gather_norm"),
    )


def gather_tokens(x: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor:
    """The tokens at the indices, in a compact buffer.

    Equivalent PyTorch: ``x.gather(1, indices[..., None].expand(-1, -1, C))``.

    Args:
        x: [B, T, C].
        indices: [B, n] int64, strictly ascending in each image, as ``select_tokens`` returns them.
            Values are not checked on a GPU, which would have to wait: there one outside [0, T) acts as the nearest
            valid one, or names no row where a new tensor is written; nothing outside the tensors is read or written.

    Returns:
        [B, n, C]. Differentiable in x any number of times; the backward of gather is ``expand_tokens``.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; indices out of range or not ascending (CPU).
        BackendError: a named backend cannot run the call.
    """
    check_tensor("gather_tokens", "x", x, "[B, T, C]", (None, None, None))
    check_indices("gather_tokens", indices, x.shape[0], x.shape[1], x)
    return ops.gather_tokens.call(x, indices, backend=resolve(backend, "gather_tokens"))


def scatter_tokens(x: Tensor, indices: Tensor, tokens: Tensor, *, backend: str = "auto") -> Tensor:
    """x with the tokens at the indices replaced; all other rows equal those of x bit for bit.

    Equivalent PyTorch: ``x.scatter(1, indices[..., None].expand(-1, -1, C), tokens)``.

    Args:
        x: [B, T, C].
        indices: [B, n] int64, strictly ascending in each image, as ``select_tokens`` returns them.
            Values are not checked on a GPU, which would have to wait: there one outside [0, T) acts as the nearest
            valid one, or names no row where a new tensor is written; nothing outside the tensors is read or written.
        tokens: [B, n, C], dtype of x.

    Returns:
        A new tensor [B, T, C]. Differentiable in x and tokens any number of times.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; indices out of range or not ascending (CPU).
        BackendError: a named backend cannot run the call.
    """
    check_scatter("scatter_tokens", x, indices, tokens)
    return ops.scatter_tokens.call(x, indices, tokens, backend=resolve(backend, "scatter_tokens"))


def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor, *, backend: str = "auto") -> Tensor:
    """``scatter_tokens`` in place: writes the tokens into x and returns x. Nothing is written if the call raises.

    Equivalent PyTorch: ``x.scatter_(1, indices[..., None].expand(-1, -1, C), tokens)``.

    Everything that shares memory with x changes too: do not use it on a tensor that a feature extractor holds.
    Arguments and errors as in ``scatter_tokens``; x must not be an expanded tensor, and nothing may share its storage.
    """
    op = "scatter_tokens_"
    check_scatter(op, x, indices, tokens)
    check_writable(op, x, indices=indices, tokens=tokens)
    if torch.is_grad_enabled() and (x.requires_grad or tokens.requires_grad):
        return x.copy_(ops.scatter_tokens.call(x, indices, tokens, backend=resolve(backend, "scatter_tokens_")))
    ops.scatter_tokens_.call(x, indices, tokens, backend=resolve(backend, "scatter_tokens_"))
    return x


def expand_tokens(tokens: Tensor, indices: Tensor, num_tokens: int, *, backend: str = "auto") -> Tensor:
    """The tokens at their places among ``num_tokens`` rows, zero elsewhere: the backward of ``gather_tokens``.

    Equivalent PyTorch: ``torch.zeros(B, T, C).scatter(1, indices[..., None].expand(-1, -1, C), tokens)``.

    Args:
        tokens: [B, n, C].
        indices: [B, n] int64, strictly ascending in each image, as ``select_tokens`` returns them.
            Values are not checked on a GPU, which would have to wait: there one outside [0, T) acts as the nearest
            valid one, or names no row where a new tensor is written; nothing outside the tensors is read or written.
        num_tokens: T >= n.

    Returns:
        [B, T, C]. Differentiable in tokens any number of times.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; indices out of range or not ascending (CPU).
        BackendError: a named backend cannot run the call.
    """
    check_tensor("expand_tokens", "tokens", tokens, "[B, n, C]", (None, None, None))
    check_integer("expand_tokens", "num_tokens", num_tokens)
    if num_tokens < tokens.shape[1]:
        raise value_error("expand_tokens", "num_tokens", f"at least n = {tokens.shape[1]}", num_tokens)
    check_indices("expand_tokens", indices, tokens.shape[0], num_tokens, tokens)
    check_compact("expand_tokens", "tokens", tokens, tokens, indices)
    return ops.expand_tokens.call(tokens, indices, num_tokens, backend=resolve(backend, "expand_tokens"))


def gather_add_norm(
    x: Tensor,
    indices: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The kept tokens plus their attention branch, and LayerNorm of that sum, in one pass.

    Equivalent PyTorch: ``tokens = gather_tokens(x, indices) + scale * gamma * branch``;
    ``normed = F.layer_norm(tokens, [C], norm_weight, norm_bias, eps)``.

    Args:
        x: [B, T, C].
        indices: [B, n] int64, strictly ascending in each image, as ``select_tokens`` returns them.
            Values are not checked on a GPU, which would have to wait: there one outside [0, T) acts as the nearest
            valid one, or names no row where a new tensor is written; nothing outside the tensors is read or written.
        branch: [B, n, C], any float type (autocast makes it a half type).
        gamma: LayerScale [C] or None for 1.
        scale: a factor of the branch; 1 in most models, 1/skip_lam in LV-ViT.
        norm_weight, norm_bias, eps: the block's second LayerNorm, as in ``token_scores``.

    Returns:
        tokens and normed, both [B, n, C] of the dtype of x. Differentiable once in x, branch, gamma and the norm.

    Raises:
        TypeError, ValueError: a dtype, shape, device or eps that does not fit; indices out of range (CPU).
        BackendError: a named backend cannot run the call.
    """
    op = "gather_add_norm"
    check_tensor(op, "x", x, "[B, T, C]", (None, None, None))
    check_indices(op, indices, x.shape[0], x.shape[1], x)
    check_compact(op, "branch", branch, x, indices)
    check_parameter(op, "gamma", gamma, x)
    check_number(op, "scale", scale)
    check_norm(op, x, norm_weight, norm_bias, eps)
    return ops.gather_add_norm.call(
        x,
        indices,
        branch,
        gamma,
        float(scale),
        norm_weight,
        norm_bias,
        eps,
        backend=resolve(backend, "gather_add_norm"),
    )


def scatter_add_tokens(
    x: Tensor,
    indices: Tensor,
    tokens: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x with the rows at the indices replaced by tokens plus their MLP branch; all other rows bit for bit those of x.

    Equivalent PyTorch: ``scatter_tokens(x, indices, tokens + scale * gamma * branch)``.

    Args:
        x: [B, T, C].
        indices: [B, n] int64, strictly ascending in each image, as ``select_tokens`` returns them.
            Values are not checked on a GPU, which would have to wait: there one outside [0, T) acts as the nearest
            valid one, or names no row where a new tensor is written; nothing outside the tensors is read or written.
        tokens: [B, n, C], dtype of x.
        branch: [B, n, C], any float type (autocast makes it a half type).
        gamma: LayerScale [C] or None for 1.
        scale: a factor of the branch; 1 in most models, 1/skip_lam in LV-ViT.

    Returns:
        A new tensor [B, T, C]. Differentiable once in x, tokens, branch and gamma.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; indices out of range (CPU).
        BackendError: a named backend cannot run the call.
    """
    op = "scatter_add_tokens"
    check_scatter(op, x, indices, tokens)
    check_compact(op, "branch", branch, x, indices)
    check_parameter(op, "gamma", gamma, x)
    check_number(op, "scale", scale)
    return ops.scatter_add_tokens.call(
        x, indices, tokens, branch, gamma, float(scale), backend=resolve(backend, "scatter_add_tokens")
    )


def scatter_add_tokens_(
    x: Tensor,
    indices: Tensor,
    tokens: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """``scatter_add_tokens`` in place: writes into x and returns x. Nothing is written if the call raises.

    Equivalent PyTorch: ``scatter_tokens_(x, indices, tokens + scale * gamma * branch)``. Arguments and errors as in
    ``scatter_add_tokens``; x must not be an expanded tensor, and nothing may share its storage.
    """
    op = "scatter_add_tokens_"
    check_scatter(op, x, indices, tokens)
    check_compact(op, "branch", branch, x, indices)
    check_parameter(op, "gamma", gamma, x)
    check_number(op, "scale", scale)
    check_writable(op, x, indices=indices, tokens=tokens, branch=branch, gamma=gamma)
    arguments = (x, indices, tokens, branch, gamma, float(scale))
    differentiable = (x, tokens, branch) if gamma is None else (x, tokens, branch, gamma)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        return x.copy_(ops.scatter_add_tokens.call(*arguments, backend=resolve(backend, "scatter_add_tokens_")))
    ops.scatter_add_tokens_.call(*arguments, backend=resolve(backend, "scatter_add_tokens_"))
    return x


def token_cut_loss(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    scale: float,
    num_prefix_tokens: int = 1,
    kind: str = "both",
    *,
    backend: str = "auto",
) -> Tensor:
    """The token cut loss of one idle layer: how much attention crosses the cut between kept and idle tokens.

    Inspired by the normalized graph cut (arXiv 2310.05654, section 3.3). With W = softmax(scale * q k^T) over all T
    tokens, m the selection (1 for prefix tokens too), a_i = sum of W_ij over selected j and w_i = sum of W_ij over
    prefix tokens j: inter_i = 1 - a_i if m_i else a_i - w_i, intra_i = 1 - a_i if m_i else 0. W is never stored.

    Equivalent PyTorch: ``W = (scale * q @ k.mT).softmax(-1)``, the sums above, ``(inter**2 + intra**2).mean()``.

    Args:
        q, k: the layer's queries and keys of all tokens, heads side by side, [B, T, C].
        indices: [B, n] int64, the selection, strictly ascending in each image, as ``select_tokens`` returns it.
        scale: of the logits. The attention map is that of the mean over heads: head_dim**-0.5 / num_heads.
        num_prefix_tokens: P, 0 <= P < T.
        kind: "both", or "inter" or "intra" for that term alone, or "none" for 0.

    Returns:
        A float32 scalar (float64 if q is float64). Differentiable once in q and k.

    Raises:
        TypeError, ValueError: a dtype, shape, device or kind that does not fit.
        BackendError: a named backend cannot run the call.
    """
    op = "token_cut_loss"
    check_tensor(op, "q", q, "[B, T, C]", (None, None, None))
    check_tensor(op, "k", k, "[B, T, C], the shape of q,", tuple(q.shape))
    if k.dtype != q.dtype:
        raise type_error(op, "k", f"of the dtype of q, {q.dtype}", k)
    if k.device != q.device:
        raise value_error(op, "k", f"on {q.device}, where q is", k)
    check_indices(op, indices, q.shape[0], q.shape[1], q)
    check_integer(op, "num_prefix_tokens", num_prefix_tokens)
    if not 0 <= num_prefix_tokens < q.shape[1]:
        raise value_error(op, "num_prefix_tokens", f"in [0, T) with T = {q.shape[1]} tokens", num_prefix_tokens)
    check_number(op, "scale", scale)
    if kind not in ROW_WEIGHTS:
        raise value_error(op, "kind", f"one of {list(ROW_WEIGHTS)}", kind)
    loss, _, _ = ops.token_cut_loss.call(
        q, k, indices, float(scale), num_prefix_tokens, kind, backend=resolve(backend, "token_cut_loss")
    )
    return loss
