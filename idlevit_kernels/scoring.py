"""Which tokens matter: the class token's raw attention logits, averaged over heads (arXiv 2310.05654, section 3.2).

s_j = (1/H) sum_h q_cls^h . k_j^h. The sum over heads is one dot product over all channels, and k_j = W_k LN(x_j) + b_k,
so s_j = (1/H) u . LN(x_j) + constant with the direction u = W_k^T q_cls. Neither 1/H nor the constant changes the order
of the tokens, so one vector an image scores all tokens, and keys are needed for the kept ones alone. Models without a
class token use the column mean of the same logits, s_j = mean_i (1/H) q_i . k_j: the direction of the mean query.

A rotary embedding turns each pair f of channels of every head by an angle a_jf of the token:
q . R_j k_j = sum_f cos(a_jf) (q_f . k_jf) + sin(a_jf) (q_f turned back by 90 degrees . k_jf). Where all heads turn
alike their sum can be taken first: two directions for each pair of channels of one head then score all tokens.

That holds where a key is a linear function of the normalised token. Where it is not (a norm on queries and keys, a
projection that is no plain Linear), or each head turns by angles of its own, the real queries and keys are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .dense import plain, plain_linear
from .errors import value_error
from .reference.layer_norm import accumulate_dtype

SCORERS = ("auto", "cls", "mean")


def check_scorer(op: str, scorer: str, num_prefix_tokens: int) -> str:
    """ "auto" is the class token where there is a prefix token, else the column mean."""
    if scorer not in SCORERS:
        raise value_error(op, "scorer", f"one of {list(SCORERS)}", scorer)
    if scorer == "cls" and num_prefix_tokens < 1:
        raise value_error(op, "scorer", "'mean' or 'auto' where there is no prefix token", scorer)
    if scorer == "auto":
        return "cls" if num_prefix_tokens else "mean"
    return scorer


LayerNorm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


def layer_norm_parameters(norm: Any) -> LayerNorm | None:
    """Weight, bias and eps for the fused kernels; None if they do not know this norm (then it is called itself).

    They know norms that equal ``F.layer_norm`` over the last axis with float32 statistics.
    """
    if not (
        plain(norm, "torch.nn.modules.normalization", "LayerNorm")
        or plain(norm, "timm.layers.norm", "LayerNorm")
        or plain(norm, "timm.layers.norm", "LayerNormFp32")
    ):
        return None
    if len(norm.normalized_shape) != 1:
        return None
    return norm.weight, norm.bias, norm.eps


def query_projection(attn: Any) -> Any:
    """The module that computes queries, or queries, keys and values in one."""
    qkv = getattr(attn, "qkv", None)
    return attn.q_proj if qkv is None else qkv


def _has_linear_keys(attn: Any, qkv: Any) -> bool:
    linear = plain_linear(attn.q_proj) and plain_linear(attn.k_proj) if qkv is None else plain_linear(qkv)
    return linear and type(attn.k_norm) is nn.Identity and type(attn.q_norm) is nn.Identity


def _has_all_biases(attn: Any, qkv: Any) -> bool:
    """Whether there is one projection of queries and keys, which knows their biases; timm's EvaAttention adds them."""
    return qkv is not None and (qkv.bias is not None or getattr(attn, "q_bias", None) is None)


Projection = tuple[Tensor, Tensor | None]  # weight [A, C], bias [A] or None


def _query_key_parameters(attn: Any) -> tuple[Projection, Projection]:
    qkv = getattr(attn, "qkv", None)
    if qkv is None:
        return (attn.q_proj.weight, attn.q_proj.bias), (attn.k_proj.weight, attn.k_proj.bias)
    width = qkv.weight.shape[0] // 3
    query_weight, key_weight = qkv.weight[: 2 * width].split(width)
    if qkv.bias is None:
        return (query_weight, getattr(attn, "q_bias", None)), (key_weight, None)
    query_bias, key_bias = qkv.bias[: 2 * width].split(width)
    return (query_weight, query_bias), (key_weight, key_bias)


def _direction(attn: Any, query_token: Tensor) -> Tensor:
    """u = W_k^T (W_q query_token + b_q); query_token is normalised, [B, C]. Returns [B, C]."""
    query_projection, (key_weight, _) = _query_key_parameters(attn)
    query = F.linear(query_token, *query_projection)
    if query.shape[1] != key_weight.shape[0]:  # several heads of queries share one of keys
        query = query.unflatten(1, (attn.num_kv_heads, -1, attn.head_dim)).sum(2).flatten(1)
    return query @ key_weight


def _key_scores(normed: Tensor, attn: Any, scorer: str, rope: Tensor | None) -> Tensor:
    """The logits of the real queries and keys; normed is [B, T, C]."""
    queries = normed[:, :1] if scorer == "cls" else normed
    if getattr(attn, "qkv", None) is None:
        query, key = attn.q_proj(queries), attn.k_proj(normed)
    elif plain_linear(attn.qkv):
        query_projection, key_projection = _query_key_parameters(attn)
        query, key = F.linear(queries, *query_projection), F.linear(normed, *key_projection)
    else:
        query, key, _ = attn.qkv(normed).chunk(3, dim=-1)
        query = query[:, : queries.shape[1]]
    head_dim = query.shape[2] // attn.num_heads
    query, key = (t.unflatten(2, (-1, head_dim)).transpose(1, 2) for t in (query, key))  # [B, H, T, head_dim]
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query, key = rotate(query, rope, attn), rotate(key, rope, attn)
    acc = accumulate_dtype(normed.dtype)
    query = query.to(acc).mean(2, keepdim=True)
    if query.shape[1] != key.shape[1]:  # several heads of queries share one of keys
        query = query.unflatten(1, (key.shape[1], -1)).sum(2)
    return (query * key.to(acc)).sum((1, 3))


def _rotary_scores(normed: Tensor, attn: Any, scorer: str, rope: Tensor) -> Tensor:
    """H times ``_key_scores``, for linear keys and angles that all heads share: rope [N, D] or [B, 1, N, D]."""
    (query_weight, query_bias), (key_weight, key_bias) = _query_key_parameters(attn)
    head_dim = query_weight.shape[0] // attn.num_heads

    def pairs(t: Tensor, dim: int) -> Tensor:  # [..., head_dim, ...] -> [..., F, 2, ...]
        return t.unflatten(dim, (2, -1)).transpose(dim, dim + 1) if attn.rotate_half else t.unflatten(dim, (-1, 2))

    def product(t: Tensor, weight: Tensor) -> Tensor:  # t [2, B, H, F, 2], weight [H, F, 2, C] -> [B, 2F, C]
        # A batch of F products for each channel of the pairs: the weight is read where it lies.
        (left, right), (first, second) = t.permute(4, 3, 0, 1, 2).flatten(2, 3).contiguous(), weight.permute(2, 1, 0, 3)
        return torch.baddbmm(left @ first, right, second).unflatten(1, (2, -1)).permute(2, 1, 0, 3).flatten(1, 2)

    angles = rope.flatten(0, -3) if rope.dim() > 2 else rope.unsqueeze(0)  # [1 or B, N, D]
    sin, cos = (pairs(t, 2)[..., 0] for t in angles.chunk(2, -1))
    P: int = attn.num_prefix_tokens
    turns = torch.cat([F.pad(cos, (0, 0, P, 0), value=1.0), F.pad(sin, (0, 0, P, 0))], 2)  # [1 or B, T, 2F]

    if scorer == "cls":
        query = pairs(F.linear(normed[:, 0], query_weight, query_bias).unflatten(1, (-1, head_dim)), 2)  # [B, H, F, 2]
    else:  # the mean of the rotated queries is linear in two means of the tokens for each pair
        weight = pairs(query_weight.unflatten(0, (-1, head_dim)), 1)  # [H, F, 2, C]
        means = (turns.to(normed.dtype).mT @ normed / normed.shape[1]).unflatten(1, (2, -1))  # [B, 2, F, C]
        by_cos, by_sin = torch.stack([torch.einsum("bsfc,hfc->sbhf", means, weight[:, :, i]) for i in (0, 1)], -1)
        if query_bias is not None:
            bias = pairs(query_bias.unflatten(0, (-1, head_dim)), 1)  # [H, F, 2]
            mean_cos, mean_sin = turns.mean(1).to(bias.dtype).unflatten(1, (2, 1, -1, 1)).unbind(1)
            by_cos, by_sin = by_cos + bias * mean_cos, by_sin + bias * mean_sin
        query = by_cos + torch.stack([-by_sin[..., 1], by_sin[..., 0]], -1)
    if query_weight.shape[0] != key_weight.shape[0]:  # several heads of queries share one of keys
        query = query.unflatten(1, (attn.num_kv_heads, -1)).sum(2)

    queries = torch.stack([query, torch.stack([query[..., 1], -query[..., 0]], -1)])  # [2, B, H, F, 2]
    directions = product(queries, pairs(key_weight.unflatten(0, (-1, head_dim)), 1))
    acc = accumulate_dtype(normed.dtype)
    parts = (normed @ directions.mT).to(acc)  # [B, T, 2F]
    if key_bias is not None:
        parts = parts + product(queries, pairs(key_bias.view(-1, head_dim, 1), 1)).mT
    return (parts * turns.to(acc)).sum(2)


def rotate(t: Tensor, rope: Tensor, attn: Any) -> Tensor:
    """Queries or keys [B, H, T, head_dim] after the rotary embedding; a class token alone is not rotated."""
    from timm.layers import apply_rot_embed_cat

    P: int = attn.num_prefix_tokens
    image_tokens = t[:, :, P:]
    if not image_tokens.shape[2]:
        return t
    return torch.cat([t[:, :, :P], apply_rot_embed_cat(image_tokens, rope, half=attn.rotate_half)], dim=2).to(t.dtype)


def score_tokens(
    x: Tensor, block: Any, norm: LayerNorm | None, scorer: str, backend: str, rope: Tensor | None
) -> Tensor:
    """Scores of all tokens for one block, with ``layer_norm_parameters`` of its first norm: x [B, T, C] -> [B, T].

    No gradient: selection has none.
    """
    attn = block.attn
    with torch.no_grad():
        qkv: Any = getattr(attn, "qkv", None)
        if not _has_linear_keys(attn, qkv) or (rope is not None and rope.dim() > 2 and rope.shape[-3] > 1):
            return _key_scores(block.norm1(x), attn, scorer, rope)
        if rope is not None:
            return _rotary_scores(block.norm1(x), attn, scorer, rope)
        if norm is not None and scorer == "cls" and _has_all_biases(attn, qkv):
            u = ops.cls_direction(x, *norm, qkv.weight, qkv.bias, backend=backend)
            return ops.token_scores(x, u, *norm, backend=backend)
        if norm is not None:
            u = _direction(attn, block.norm1(x[:, 0]) if scorer == "cls" else block.norm1(x).mean(1))
            return ops.token_scores(x, u, *norm, backend=backend)
        normed = block.norm1(x)
        u = _direction(attn, normed[:, 0] if scorer == "cls" else normed.mean(1))
        acc = accumulate_dtype(x.dtype)
        return (normed.to(acc) * u.to(acc).unsqueeze(1)).sum(2)


def select_tokens(
    x: Tensor, block: Any, num_keep: int, num_prefix_tokens: int, scorer: str, backend: str, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tokens that one block computes: their indices [B, n], and norm1 of them, [B, n, C]."""
    norm, attn = layer_norm_parameters(block.norm1), block.attn
    qkv: Any = getattr(attn, "qkv", None)
    linear = rope is None and _has_linear_keys(attn, qkv) and _has_all_biases(attn, qkv)
    if norm is not None and scorer == "cls" and linear:
        return ops.cls_select_gather_norm(x, num_keep, num_prefix_tokens, *norm, qkv.weight, qkv.bias, backend=backend)
    scores = score_tokens(x, block, norm, scorer, backend, rope)  # [B, T]
    if norm is not None:
        return ops.select_gather_norm(x, scores, num_keep, num_prefix_tokens, *norm, backend=backend)
    indices = ops.select_tokens(scores, num_keep, num_prefix_tokens, backend=backend)
    return indices, block.norm1(ops.gather_tokens(x, indices, backend=backend))
