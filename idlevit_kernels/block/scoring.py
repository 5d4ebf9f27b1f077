"""Which tokens matter: the class token's raw attention logits, averaged over heads (arXiv 2310.05654, section 3.2).

s_j = (1/H) sum_h q_cls^h . k_j^h. The sum over heads is one dot product over all channels, and k_j = W_k LN(x_j) + b_k,
so s_j = (1/H) u . LN(x_j) + constant with the direction u = W_k^T q_cls. Neither 1/H nor the constant changes the order
of the tokens, so one vector an image scores all tokens, and keys are needed for the kept ones alone. Models without a
class token use the column mean of the same logits, s_j = mean_i (1/H) q_i . k_j: the direction of the mean query.

A rotary embedding turns each pair f of channels of every head by an angle a_jf of the token:
q . R_j k_j = sum_f cos(a_jf) (q_f . k_jf) + sin(a_jf) (q_f turned back by 90 degrees . k_jf). Where all heads turn
alike their sum can be taken first: two directions for each pair of channels of one head then score all tokens.

That holds where a key is a linear function of the normalised token. Where it is not (a norm on queries and keys, a
projection that is no plain Linear), or each head turns by angles of its own, the real queries and keys are computed;
under a mask as well, whose mean has other queries for each key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Words, type_error, value_error
from ..ops import library as ops
from ..ops.dtypes import accumulate_dtype
from .context import padding, seen
from .linear import Linear

SCORERS = ("auto", "cls", "mean", "random")
SELECTS = ("top",)

Scorer = str | Callable[[Tensor, nn.Module], Tensor]
Select = str | Callable[[Tensor, int], Tensor]


def check_scorer(op: str, scorer: Any, num_prefix_tokens: int) -> Any:
    """ "auto" is the class token where there is a prefix token, else the column mean."""
    if callable(scorer):
        return scorer
    if not isinstance(scorer, str) or scorer not in SCORERS:
        raise value_error(op, "scorer", f"one of {list(SCORERS)}, or a function (x, block) -> [B, T]", scorer)
    if scorer == "cls" and num_prefix_tokens < 1:
        raise value_error(op, "scorer", "'mean' or 'auto' where there is no prefix token", scorer)
    if scorer == "auto":
        return "cls" if num_prefix_tokens else "mean"
    return scorer


def check_select(op: str, select: Any) -> Any:
    if callable(select) or (isinstance(select, str) and select in SELECTS):
        return select
    expected = f"one of {list(SELECTS)}, or a function (tokens, num_keep) -> indices [B, num_keep]"
    raise value_error(op, "select", expected, select)


class Selection:
    """How tokens are chosen.

    Attributes:
        scorer: "cls", "mean", "random", or a function (x [B, T, C], block) -> scores [B, T].
        select: "top", the largest scores, or a function (image tokens [B, N, C], K) -> their indices [B, K].
        own: whether the scores are not the block's own attention logits.
    """

    def __init__(self, scorer: Any, select: Any = "top"):
        self.scorer, self.select = scorer, select
        self.own = select != "top" or callable(scorer) or scorer == "random"

    def scores(self, x: Tensor, block: nn.Module | None, num_keep: int, num_prefix_tokens: int) -> Tensor:
        """[B, T]; of a ``select`` of its own, 1 for the tokens that it chose and 0 for the others."""
        if self.select != "top":
            return self._chosen(x, num_keep, num_prefix_tokens)
        if self.scorer == "random":
            return torch.rand(x.shape[:2], device=x.device)
        scores = self.scorer(x, block)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise type_error("scorer", "the result", "a float tensor [B, T]", scores)
        if scores.shape != x.shape[:2] or scores.device != x.device:
            raise value_error("scorer", "the result", f"[B, T] = {list(x.shape[:2])} on {x.device}", scores)
        return scores.to(accumulate_dtype(x.dtype)).resolve_neg()

    def _chosen(self, x: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
        kept = self.select(x[:, num_prefix_tokens:], num_keep)
        B, N = x.shape[0], x.shape[1] - num_prefix_tokens
        if not isinstance(kept, Tensor) or kept.dtype != torch.int64:
            raise type_error("select", "the result", "an int64 tensor [B, num_keep]", kept)
        if kept.shape != (B, num_keep) or kept.device != x.device:
            raise value_error("select", "the result", f"[B, num_keep] = [{B}, {num_keep}] on {x.device}", kept)
        if kept.device.type == "cpu" and not torch.compiler.is_compiling() and kept.numel():
            ordered = kept.sort(1).values  # on a GPU the check would wait for the device
            if ordered[:, 0].amin() < 0 or ordered[:, -1].amax() >= N or (ordered.diff(dim=1) == 0).any():
                got = Words(f"values from {int(kept.min())} to {int(kept.max())}, some perhaps twice")
                raise value_error("select", "the result", f"different indices in [0, N) = [0, {N}) in each image", got)
        scores = torch.zeros(x.shape[:2], device=x.device)
        return scores.scatter(1, kept + num_prefix_tokens, 1.0)


def direction(q: Linear, k: Linear, heads: int, queries: Tensor) -> Tensor:
    """u = W_k^T (W_q queries + b_q); queries is a normalised token or the mean of all, [B, C]. Returns [B, C]."""
    assert q.weight is not None and k.weight is not None
    query = F.linear(queries, q.weight, q.bias)
    if query.shape[1] != k.weight.shape[0]:  # several heads of queries share one of keys
        head_dim = q.weight.shape[0] // heads
        query = query.unflatten(1, (k.weight.shape[0] // head_dim, -1, head_dim)).sum(2).flatten(1)
    return query @ k.weight


def from_keys(q: Tensor, k: Tensor, scorer: str) -> Tensor:
    """H times the mean logits of real queries and keys [B, H, T, head_dim]: [B, T]."""
    acc = accumulate_dtype(q.dtype)
    query = q[:, :, :1].to(acc) if scorer == "cls" else q.to(acc).mean(2, keepdim=True)
    if query.shape[1] != k.shape[1]:  # several heads of queries share one of keys
        query = query.unflatten(1, (k.shape[1], -1)).sum(2)
    return (query * k.to(acc)).sum((1, 3))


def from_seen_keys(q: Tensor, k: Tensor, scorer: str, mask: Tensor, scale: float | None) -> Tensor:
    """The mean logits, over ``scale``, of the pairs that the mask [B or 1, H or 1, T, T] lets see each other: [B, T],
    -inf for a key that no query sees. Such a key is padding, whose own queries do not count.

    The mean runs over other queries for each key, so no direction gives it: one product of T^2 C more.
    """
    acc = accumulate_dtype(q.dtype)
    q, k = q.to(acc), k.to(acc)
    sees = seen(mask)
    sees = sees & ~padding(sees)[:, None, :, None]
    if scorer == "cls":
        q, mask, sees = q[:, :, :1], mask[:, :, :1], sees[:, :, :1]
    total = (sees.to(acc).mT @ q * k).sum((1, 3))
    if mask.dtype != torch.bool:
        bias = mask.to(acc).masked_fill(~sees, 0).sum(2)  # [B or 1, H or 1, T]
        total = total + bias.expand(-1, q.shape[1], -1).sum(1) / (scale or q.shape[3] ** -0.5)
    pairs = sees.sum(2).expand(-1, q.shape[1], -1).sum(1)  # [B or 1, T]
    return (total / pairs).masked_fill(pairs == 0, -torch.inf)


def rotary(
    normed: Tensor,
    q: Linear,
    k: Linear,
    heads: int,
    scorer: str,
    rope: Tensor,
    num_prefix_tokens: int,
    rotate_half: bool,
) -> Tensor:
    """``from_keys`` for linear keys and angles that all heads share: rope [N, D] or [B, 1, N, D]."""
    query_weight, query_bias, key_weight, key_bias = q.weight, q.bias, k.weight, k.bias
    assert query_weight is not None and key_weight is not None
    head_dim = query_weight.shape[0] // heads

    def pairs(t: Tensor, dim: int) -> Tensor:  # [..., head_dim, ...] -> [..., F, 2, ...]
        return t.unflatten(dim, (2, -1)).transpose(dim, dim + 1) if rotate_half else t.unflatten(dim, (-1, 2))

    def product(t: Tensor, weight: Tensor) -> Tensor:  # t [2, B, H, F, 2], weight [H, F, 2, C] -> [B, 2F, C]
        # A batch of F products for each channel of the pairs: the weight is read where it lies.
        (left, right), (first, second) = t.permute(4, 3, 0, 1, 2).flatten(2, 3).contiguous(), weight.permute(2, 1, 0, 3)
        return torch.baddbmm(left @ first, right, second).unflatten(1, (2, -1)).permute(2, 1, 0, 3).flatten(1, 2)

    angles = rope.flatten(0, -3) if rope.dim() > 2 else rope.unsqueeze(0)  # [1 or B, N, D]
    sin, cos = (pairs(t, 2)[..., 0] for t in angles.chunk(2, -1))
    prefix = (0, 0, num_prefix_tokens, 0)
    turns = torch.cat([F.pad(cos, prefix, value=1.0), F.pad(sin, prefix)], 2)  # [1 or B, T, 2F]

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
        query = query.unflatten(1, (key_weight.shape[0] // head_dim, -1)).sum(2)

    queries = torch.stack([query, torch.stack([query[..., 1], -query[..., 0]], -1)])  # [2, B, H, F, 2]
    directions = product(queries, pairs(key_weight.unflatten(0, (-1, head_dim)), 1))
    acc = accumulate_dtype(normed.dtype)
    parts = (normed @ directions.mT).to(acc)  # [B, T, 2F]
    if key_bias is not None:
        parts = parts + product(queries, pairs(key_bias.view(-1, head_dim, 1), 1)).mT
    return (parts * turns.to(acc)).sum(2)


def rotate(t: Tensor, rope: Tensor, num_prefix_tokens: int, rotate_half: bool) -> Tensor:
    """Queries or keys [B, H, T, head_dim], with each pair (a, b) of channels of an image token turned.

    It becomes (a cos - b sin, b cos + a sin), as timm's ``apply_rot_embed_cat`` has it. A class token alone is not
    rotated.
    """
    from timm.layers import apply_rot_embed_cat

    if t.dtype is rope.dtype is torch.float32 and ops.direct(t, rope):
        return _rotate_in_one_pass(t, rope, num_prefix_tokens, rotate_half)
    image_tokens = t[:, :, num_prefix_tokens:]
    if not image_tokens.shape[2]:
        return t
    turned = apply_rot_embed_cat(image_tokens, rope, half=rotate_half)
    return torch.cat([t[:, :, :num_prefix_tokens], turned], dim=2).to(t.dtype)


def _rotate_in_one_pass(t: Tensor, rope: Tensor, num_prefix_tokens: int, rotate_half: bool) -> Tensor:
    """One complex product where the channels of a pair lie side by side; prefix tokens turn by the angle 0."""
    sin, cos = (a.chunk(2, -1)[0] if rotate_half else a[..., ::2] for a in rope.chunk(2, -1))
    prefix = (0, 0, num_prefix_tokens, 0)
    cos, sin = F.pad(cos, prefix, value=1.0), F.pad(sin, prefix)
    if rotate_half:
        a, b = t.chunk(2, -1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1)
    turns = torch.complex(cos, sin)
    return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turns).flatten(-2)
