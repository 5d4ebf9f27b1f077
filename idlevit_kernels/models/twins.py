"""timm's Twins-PCPVT (arXiv 2104.13840): a pyramid with PVT's spatial-reduction attention.

There, keys and values come from cells of R x R tokens that a convolution pools into one. The whole grid is pooled, idle
tokens included; kept tokens alone send queries and go through the MLP. Positional convolutions see the whole grid.

Score: a token has no key of its own, but a part in that of its cell. A pooled key is W_k LN(z) + b_k with z = b_r +
sum_p W_r[p] x_p over the places p of the cell, x normalised. So the column mean of its logits, averaged over heads, is

    1/H mean_query . key = sum_p s_p + a constant,   s_p = rstd(z) (d . W_r[p] x_p + d . b_r / R^2)

with d = the LayerNorm's weight times W_k^T mean_query, less its mean over channels (LN subtracts the mean), and without
1/H, which changes no order. s_p is the token's share of the mean attention logit of its key: exact, and the ordinary
column mean where the cell is one token. Tokens past the last whole cell are in no key; their share is 0.

Stages with R = 1 have ordinary attention, with keys of tokens: there idle tokens have no key, as in other idle blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block import scoring
from ..block.attention import attend, heads_apart
from ..block.context import Context
from ..block.linear import Linear
from ..block.mlp import find_mlp
from ..block.parts import Entered, Form, Parts, Watch, find_branch, find_linear, find_norm, find_optional
from ..errors import ArgumentTypeError, value_error
from ..ops.dtypes import accumulate_dtype
from ..ops.library import Calls
from ..versions import library_class
from .family import Family, places
from .grid import through_hooks, why_no_attention


class PooledAttention:
    """PVT's attention: keys and values of cells that a convolution pools; where there is none, of the tokens."""

    cut_reason = "the token cut loss is not defined for pooled keys"

    def __init__(self, module: Any, watch: Watch):
        look = watch.value
        self.module = module
        watch.is_own(module)
        self.watched = watch.is_watched(module)
        self.heads = look(module, "num_heads")
        self.q, self.kv, self.proj = (find_linear(look(module, name), watch) for name in ("q", "kv", "proj"))
        self.pool, self.norm = look(module, "sr"), look(module, "norm")
        for part in (self.pool, self.norm):
            if part is not None:
                watch.is_own(part)
                watch.is_watched(part)
        self.scale = None if look(module, "fused_attn") else look(module, "scale")
        drop, fused = look(module, "attn_drop"), bool(look(module, "fused_attn"))
        self.drop = None if fused else find_optional(drop, watch)
        self.dropout = (look(drop, "p") or 0.0) if fused and look(module, "training") else 0.0
        self.proj_drop = find_optional(look(module, "proj_drop"), watch)

    @property
    def weight(self) -> Tensor | None:
        return self.q.weight

    def front(self, scorer: str, context: Context) -> None:
        return None

    def direction(self, scorer: str, context: Context, queries: Callable[[], Tensor]) -> Tensor | None:
        return None if self.pool is not None else scoring.direction(self.q, self._keys(), self.heads, queries())

    def _keys(self) -> Linear:
        assert self.kv.weight is not None
        width = self.kv.weight.shape[0] // 2
        return Linear(None, self.kv.weight[:width], None if self.kv.bias is None else self.kv.bias[:width], True)

    def needs_all(self, context: Context) -> bool:
        return self.pool is not None

    def prepare(self, normed: Tensor, context: Context) -> Tensor:
        """The whole grid is pooled, idle tokens included: [B, H * W, C] -> [B, cells, C]."""
        assert self.pool is not None and context.grid is not None
        return self.pool(normed.transpose(1, 2).unflatten(2, context.grid)).flatten(2).transpose(1, 2)

    def scores(self, normed: Tensor, prepared: Tensor | None, scorer: str, context: Context) -> Tensor:
        u = scoring.direction(self.q, self._keys(), self.heads, normed.mean(1))
        if prepared is None or context.grid is None:
            return (normed @ u.unsqueeze(2)).squeeze(2)
        return shares(self.module, u, normed, prepared, context.grid)

    def cut(self, *_: Any) -> Tensor:
        raise ArgumentTypeError(self.cut_reason)

    def __call__(self, y: Tensor, context: Context) -> Tensor:
        pooled = None if self.pool is None else self.prepare(y, context)
        return self._in_module(y, pooled)

    def among(self, y: Tensor, prepared: Tensor, indices: Tensor, context: Context, calls: Calls) -> Tensor:
        return self._in_module(y, prepared)

    def _in_module(self, y: Tensor, pooled: Tensor | None) -> Tensor:
        if not self.watched:
            return self._attend(y, pooled)
        return through_hooks(self.module, lambda y: self._attend(y, pooled), y)

    def _attend(self, y: Tensor, pooled: Tensor | None) -> Tensor:
        """y [B, K, C], pooled [B, cells, C] -> [B, K, C]."""
        query = self.q(y)
        key, value = self.kv(y if pooled is None else self.norm(pooled)).chunk(2, dim=2)
        query, key, value = (heads_apart(t, y.shape[2] // self.heads) for t in (query, key, value))
        out = self.proj(attend(query, key, value, None, self.scale, self.dropout, None, self.drop))
        return out if self.proj_drop is None else self.proj_drop(out)


def shares(attn: Any, direction: Tensor, normed: Tensor, pooled: Tensor, size: tuple[int, int]) -> Tensor:
    """Each token's share of the mean logit of its cell: normed [B, H * W, C], pooled [B, cells, C] -> [B, H * W].

    ``direction`` [B, C] is W_k^T of the mean query.
    """
    (H, W), R, C = size, attn.sr_ratio, attn.dim
    rows, columns = H // R, W // R
    direction = direction * attn.norm.weight
    direction = direction - direction.mean(1, keepdim=True)
    by_place = (direction @ attn.sr.weight.flatten(1)).view(-1, C, R, R).permute(0, 2, 3, 1)  # [B, R, R, C]
    cells = normed.unflatten(1, size)[:, : rows * R, : columns * R].unflatten(2, (columns, R)).unflatten(1, (rows, R))
    acc = accumulate_dtype(normed.dtype)
    shares = (cells.to(acc) * by_place.to(acc)[:, None, :, None]).sum(5)  # [B, rows, R, columns, R]
    if attn.sr.bias is not None:
        shares = shares + (direction @ attn.sr.bias / R**2).view(-1, 1, 1, 1, 1)
    _, _, rstd = torch.native_layer_norm(pooled.to(acc), (C,), None, None, attn.norm.eps)
    shares = (shares * rstd.view(-1, rows, 1, columns, 1)).flatten(3, 4).flatten(1, 2)
    return F.pad(shares, (0, W - columns * R, 0, H - rows * R)).flatten(1)


class PooledForm(Form):
    """Twins' block: x + attn(norm1(x), size), then x + mlp(norm2(x)); x [B, H * W, C]."""

    kinds = ("TwinsBlock",)
    sequence = False
    alone = None

    def why_unsupported(self, block: Any) -> str | None:
        kind = library_class("LocallyGroupedAttn")
        if kind is not None and type(block.attn) is kind:
            return "its attention is the locally grouped one of Twins-SVT (LocallyGroupedAttn), which is not supported"
        reason = why_no_attention(block.attn, "GlobalSubSampleAttn")
        if reason is not None:
            return reason
        if not (isinstance(block.attn.q, nn.Linear) and isinstance(block.attn.kv, nn.Linear)):
            return "its queries and keys are not projected by Linear layers"
        if any(find_linear(p, Watch()).weight is None for p in (block.attn.q, block.attn.kv)):
            return (
                "its queries and keys are projected by layers that are patched, offloaded or quantised, so that their"
                " weights cannot be read for the scores; undo that, or remove_idle"
            )
        if block.attn.sr is None:
            return None
        norm = find_norm(block.attn.norm, Watch()).parameters
        if type(block.attn.sr) is not nn.Conv2d or norm is None or norm[0] is None:
            return "its pooling is not timm's convolution and LayerNorm, whose weights are read for the scores"
        return None

    def parts(self, block: Any, watch: Watch) -> Parts:
        norm1, norm2 = (find_norm(watch.value(block, name), watch) for name in ("norm1", "norm2"))
        attention = PooledAttention(watch.value(block, "attn"), watch)
        branches = [find_branch(watch, watch.value(block, f"drop_path{i}")) for i in (1, 2)]
        return Parts(
            norm1, attention, branches[0], norm2, find_mlp(watch.value(block, "mlp"), watch), branches[1], watch, self
        )

    def context(self, block: Any, size: tuple[int, int]) -> Context:  # type: ignore[override]
        return Context(grid=(int(size[0]), int(size[1])))

    def arguments(self, context: Context) -> dict[str, Any]:
        return {"size": context.grid}

    def enter(self, block: Any, x: Tensor, context: Context) -> Entered:
        grid = context.grid
        if grid is None or (isinstance(x, Tensor) and x.dim() == 3 and grid[0] * grid[1] != x.shape[1]):
            raise value_error(type(block).__name__, "context", "Context(grid=(H, W)) with H * W tokens", grid)
        return x, context, None


class TwinsTransformers(Family):
    name = "timm Twins-PCPVT"
    forms = (PooledForm(),)

    def find(self, model: nn.Module) -> list[Any]:
        return places(model, "Twins")

    def blocks(self, place: Any) -> list[nn.Module]:
        return [block for stage in place.blocks for block in stage]

    def num_prefix_tokens(self, place: Any) -> int:
        return 0
