"""Multi-head self-attention of timm and transformers, part by part, on whichever tokens it is given.

A module whose formula is known and that nobody watches is written out; any other is called on the kept tokens. Its
projections of queries and keys are read for the scores (see ``scoring``) and for the token cut loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentTypeError, describe
from ..ops.dtypes import accumulate_dtype
from ..ops.library import Calls
from . import scoring
from .context import Context
from .linear import Linear, linear
from .parts import Watch, find_linear, find_optional


class Projected(NamedTuple):
    """Queries and keys of all tokens, [B, H, T, head_dim]; values, if the module that gives them all was called."""

    q: Tensor
    k: Tensor
    v: Tensor | None


def heads_apart(t: Tensor, head_dim: int) -> Tensor:
    """[B, T, H * head_dim] -> [B, H, T, head_dim]."""
    return t.unflatten(2, (-1, head_dim)).transpose(1, 2)


def heads_together(t: Tensor) -> Tensor:
    """[B, H, T, head_dim] -> [B, T, H * head_dim]."""
    return t.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softmax: Any = None,
    drop: Any = None,
) -> Tensor:
    """[B, H, n, head_dim] each, keys and values perhaps of others, mask [B or 1, H or 1, n, keys] -> [B, n, C].

    ``softmax`` and ``drop``: modules that somebody watches, or None.
    """
    if softmax is None and drop is None:
        return heads_together(F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    weights = query * scale @ key.transpose(-2, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask
    weights = weights.softmax(-1) if softmax is None else softmax(weights)
    weights = torch.dropout(weights, dropout, dropout > 0) if drop is None else drop(weights)
    return heads_together(weights @ value)


def check_branch(module: Any, out: Any, y: Tensor) -> Tensor:
    """What a module returned for y [B, n, C], if it is such a tensor."""
    if isinstance(out, Tensor) and out.shape == y.shape:
        return out
    got = describe(out) if isinstance(out, Tensor) else f"a {type(out).__name__}"
    raise ArgumentTypeError(
        f"IdleBlock: {type(module).__name__} must return a tensor like its input, {describe(y)}, got {got}. Was it put"
        " in place after apply_idle?"
    )


class SelfAttention:
    """Attention with one projection ``qkv`` of queries, keys and values, or one each.

    Args:
        module: timm's Attention, AttentionRope or EvaAttention, or one that has their attributes.
        watch: what reads it.
        known: whether the module's formula is known, so that it may be written out where nobody watches.
    """

    def __init__(self, module: Any, watch: Watch, known: bool):
        look = watch.value
        self.module = module
        watched = watch.is_watched(module)
        self.written = self.calls_projections = known and not watched
        self.cut_reason = "" if known else f"its attention is {type(module).__name__}, whose keys are not known"
        self.heads: int = look(module, "num_heads")
        self.rotate_half, self.num_prefix_tokens = look(module, "rotate_half"), look(module, "num_prefix_tokens")
        self.fused, scale = bool(look(module, "fused_attn", True)), look(module, "scale")
        # PyTorch's fused attention, as timm calls it, has a scale of its own.
        self.scale: float | None = None if self.fused else scale
        self.cut_scale: float | None = scale
        training = look(module, "training")
        drop = look(module, "attn_drop")
        self.attn_drop, self.dropout = drop, 0.0
        if drop is not None and self.fused:
            self.attn_drop, self.dropout = None, (watch.value(drop, "p") or 0.0) if training else 0.0
        elif drop is not None:
            self.attn_drop = find_optional(drop, watch)
        self.q_norm, self.k_norm, self.norm, self.proj_drop = (
            find_optional(look(module, name), watch) for name in ("q_norm", "k_norm", "norm", "proj_drop")
        )
        gate, proj = look(module, "gate"), look(module, "proj")
        self.gate = None if gate is None else find_linear(gate, watch)
        self.proj = None if proj is None else find_linear(proj, watch)
        self._find_projections(module, watch)
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        self.turns = bool(norms)
        self.linear_keys = self.weight is not None and all(watch.is_a(norm, "Identity") for norm in norms)
        if self.qkv is None:
            self.linear_keys = self.linear_keys and self.separate[1].weight is not None

    def _find_projections(self, module: Any, watch: Watch) -> None:
        look, qkv = watch.value, watch.value(module, "qkv")
        self.qkv = None if qkv is None else find_linear(qkv, watch)
        self.biases: tuple[Tensor, ...] | None = None  # of queries, keys and values, where qkv has none (EVA)
        self.separate: tuple[Linear, ...] = ()
        if self.qkv is None:
            self.separate = tuple(find_linear(look(module, name), watch) for name in ("q_proj", "k_proj", "v_proj"))
            return
        biases = tuple(look(module, name) for name in ("q_bias", "k_bias", "v_bias"))
        if biases[0] is not None:
            self.biases = biases
            if not look(module, "qkv_bias_separate"):  # EVA's forward reads the weight and does not call the module
                self.qkv = self.qkv.read()

    # Nothing below keeps a view of a weight: it would stay behind where the weight gets other memory.

    @property
    def weight(self) -> Tensor | None:
        """That of the first projection, if its formula is known."""
        return (self.separate[0] if self.qkv is None else self.qkv).weight

    def projections(self) -> tuple[Linear, ...]:
        """Those of queries, keys and values, as they are now."""
        if self.qkv is None:
            return self.separate
        assert self.qkv.weight is not None
        width = self.qkv.weight.shape[0] // 3
        bias = self.qkv.bias
        biases = self.biases or ((None,) * 3 if bias is None else bias.split(width))
        return tuple(Linear(None, w, b, True) for w, b in zip(self.qkv.weight.split(width), biases, strict=True))

    # Attention itself

    def __call__(self, y: Tensor, context: Context) -> Tensor:
        if not self.written:
            return self.call(y, context)
        return self.finish(*self.project(y, context), y)

    def call(self, y: Tensor, context: Context) -> Tensor:
        return check_branch(self.module, self.module(y, **context.arguments()), y)

    def project(self, y: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, n, C] -> queries, keys and values [B, H, n, head_dim]."""
        if self.qkv is None:
            q, k, v = self._apart(*(p(y) for p in self.separate))
        else:
            q, k, v = self._split(self.qkv(y) if self.biases is None else self._biased(y), 3)
        if self.turns or context.rope is not None:
            q, k = self._turn(q, k, context)
        return q, k, v

    def _apart(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        head_dim = query.shape[2] // self.heads
        return tuple(heads_apart(t, head_dim) for t in (query, *others))

    def _split(self, t: Tensor, count: int) -> tuple[Tensor, ...]:
        """[B, n, count * H * head_dim] -> as many times [B, H, n, head_dim]."""
        B, n, width = t.shape
        return t.view(B, n, count, self.heads, width // (count * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def _biased(self, y: Tensor) -> Tensor:
        assert self.qkv is not None and self.biases is not None
        bias = torch.cat(self.biases)
        if self.qkv.plain and self.qkv.weight is not None:
            return linear(y, self.qkv.weight, bias)
        return self.qkv(y) + bias

    def _turn(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if context.rope is not None:
            q, k = self.rotate(q, context.rope), self.rotate(k, context.rope)
        return q, k

    def rotate(self, t: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys [B, H, T, head_dim] after the rotary embedding; a class token alone is not rotated."""
        return scoring.rotate(t, rope, self.num_prefix_tokens, self.rotate_half)

    def finish(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """Attention and what follows it: [B, H, n, head_dim] each, y [B, n, C] -> [B, n, C]; several heads of queries
        may share one of keys and values."""
        if k.shape[1] != q.shape[1]:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if self.dropout == 0.0 and self.fused:  # each argument more costs a microsecond
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            out = attend(q, k, v, None, self.scale, self.dropout, None, self.attn_drop)
        if self.norm is not None:
            out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(y).sigmoid()
        assert self.proj is not None
        out = self.proj(out)
        return out if self.proj_drop is None else self.proj_drop(out)

    # What is wanted of all tokens

    def needs_all(self, context: Context) -> bool:
        rope = context.rope
        return not self.linear_keys or (rope is not None and rope.dim() > 2 and rope.shape[-3] > 1)

    def prepare(self, normed: Tensor, context: Context) -> Projected:
        # An attention that is called as a whole calls its projections: then they are read here, if they can be.
        if self.qkv is not None and (self.qkv.weight is None or (self.written and not self.qkv.plain)):
            return Projected(*self.project(normed, context))
        if self.qkv is None:
            q, k = self._apart(*((p if self.calls_projections else p.read())(normed) for p in self.separate[:2]))
        else:
            weight, bias = self.qkv.weight, self.qkv.bias if self.biases is None else torch.cat(self.biases)
            assert weight is not None
            both = 2 * (weight.shape[0] // 3)
            q_and_k = linear(normed, weight[:both], None if bias is None else bias[:both])
            q, k = self._split(q_and_k, 2)
        return Projected(*self._turn(q, k, context), None)

    def among(self, y: Tensor, prepared: Projected, indices: Tensor, context: Context, calls: Calls) -> Tensor:
        if not self.written:
            return self.call(y, context)
        # Heads together, each is a tensor of tokens, [B, T, A].
        q, k = (calls.gather_tokens(heads_together(t), indices) for t in prepared[:2])
        if prepared.v is None:
            v = self.projections()[2](y)
        else:
            v = calls.gather_tokens(heads_together(prepared.v), indices)
        head_dim = prepared.q.shape[3]
        q, k, v = (heads_apart(t, head_dim) for t in (q, k, v))
        return self.finish(q, k, v, y)

    # Scores

    def front(self, scorer: str, context: Context) -> tuple[Tensor, Tensor | None] | None:
        qkv = self.qkv
        if (
            scorer != "cls"
            or context.rope is not None
            or context.mask is not None
            or not self.linear_keys
            or qkv is None
            or self.biases is not None
        ):
            return None
        return None if qkv.weight is None else (qkv.weight, qkv.bias)

    def direction(self, scorer: str, context: Context, queries: Callable[[], Tensor]) -> Tensor | None:
        if context.rope is not None or context.mask is not None or not self.linear_keys:
            return None
        query, key, _ = self.projections()
        return scoring.direction(query, key, self.heads, queries())

    def scores(self, normed: Tensor, prepared: Projected | None, scorer: str, context: Context) -> Tensor:
        if context.mask is not None:
            return self._masked_scores(normed, prepared, scorer, context.mask)
        if prepared is not None:
            return scoring.from_keys(prepared.q, prepared.k, scorer)
        if context.rope is not None:
            query, key, _ = self.projections()
            turns = context.rope, self.num_prefix_tokens, self.rotate_half
            return scoring.rotary(normed, query, key, self.heads, scorer, *turns)
        queries = normed[:, 0] if scorer == "cls" else normed.mean(1)
        query, key, _ = self.projections()
        u = scoring.direction(query, key, self.heads, queries)
        acc = accumulate_dtype(normed.dtype)
        return (normed.to(acc) * u.to(acc).unsqueeze(1)).sum(2)

    def _masked_scores(self, normed: Tensor, prepared: Projected | None, scorer: str, mask: Tensor) -> Tensor:
        # What hides keys from one query in all heads alike changes no logit: the direction scores the keys it sees.
        if prepared is None and scorer == "cls" and mask.dtype == torch.bool and mask.shape[1] == 1:
            return self.scores(normed, None, scorer, Context.NOTHING).masked_fill(~mask[:, 0, 0], -torch.inf)
        if prepared is None:
            q, k = self._apart(*(p.read()(normed) for p in self.projections()[:2]))
            prepared = Projected(q, k, None)
        return scoring.from_seen_keys(prepared.q, prepared.k, scorer, mask, self.scale)

    def cut(self, prepared: Projected, indices: Tensor, num_prefix_tokens: int, kind: str, calls: Calls) -> Tensor:
        q, k = prepared.q, prepared.k
        if k.shape[1] != q.shape[1]:  # several heads of queries share one of keys
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        assert self.cut_scale is not None
        q, k, scale = heads_together(q), heads_together(k), self.cut_scale / self.heads
        return calls.token_cut_loss(q, k, indices, scale, num_prefix_tokens, kind)[0]


class CalledAttention(SelfAttention):
    """Any attention whose keys are linear in its tokens: called as it is on the kept ones; its projections are read for
    the scores.

    Args:
        module: y [B, n, C] -> [B, n, C], or a tuple that begins with it.
        watch: what reads it.
        heads: of the queries.
        projections: one Linear of queries, keys and values (in this order), or three. Others than plain ones are
            called; then the keys of all tokens are computed.
        scale: of its logits, which the token cut loss needs; None if there is to be no such loss.
    """

    written = calls_projections = turns = False
    biases = q_norm = k_norm = num_prefix_tokens = rotate_half = None

    def __init__(self, module: Any, watch: Watch, heads: int, projections: tuple[Any, ...], scale: float | None = None):
        self.module = module
        self.own = watch.is_own(module)
        self.watched = watch.is_watched(module)
        self.heads, self.scale, self.cut_scale = heads, scale, scale
        self.cut_reason = "" if scale else f"the scale of its attention, {type(module).__name__}, is not known"
        found = tuple(find_linear(projection, watch) for projection in projections)
        self.qkv, self.separate = (found[0], ()) if len(found) == 1 else (None, found)
        self.linear_keys = all(projection.weight is not None for projection in found[:2])

    def call(self, y: Tensor, context: Context) -> Tensor:
        out = self.module(y, **context.arguments())
        return check_branch(self.module, out[0] if isinstance(out, tuple) else out, y)


_KNOWN = ("Attention", "AttentionRope", "EvaAttention")


def find_attention(module: Any, watch: Watch) -> SelfAttention:
    """timm's attention, or one swapped in that has its attributes; ``why_no_keys`` says which."""
    return SelfAttention(module, watch, watch.is_a(module, *_KNOWN))


def why_no_keys(attn: Any) -> str | None:
    """Why an attention cannot be scored: which of the attributes that are read it lacks; None if it has them."""
    names = ["num_heads"]
    if getattr(attn, "qkv", None) is None:
        names += ["q_proj", "k_proj"] if hasattr(attn, "q_proj") else ["qkv"]
    missing = [name for name in names if getattr(attn, name, None) is None]
    if missing:
        return f"its attention, {type(attn).__name__}, has no {', '.join(missing)}"
    bias = getattr(attn, "q_bias", None)
    if bias is not None and bias.is_meta and "forward" in attn.__dict__:
        return (
            f"its attention, {type(attn).__name__}, whose own parameters are offloaded (accelerate) and cannot be read"
            " for the scores; load them, or remove_idle"
        )
    return None
