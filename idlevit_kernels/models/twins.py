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

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..backends import resolve
from ..block import IdleBlock
from ..reference.layer_norm import accumulate_dtype
from ..schedule import num_kept
from ..scoring import layer_norm_parameters
from .grid import IdleGridBlock, finish, gather, linear, put_blocks

NAME = "timm Twins-PCPVT"


class IdlePooledBlock(IdleGridBlock):
    """A block with spatial-reduction attention that computes K tokens of the grid and lets the others idle.

    Args:
        block: timm's Twins block with GlobalSubSampleAttn.
        keep_ratio, num_prefix_tokens, scorer: as in ``IdleGridBlock``; K = int(keep_ratio * H * W), at least 1.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """x [B, H * W, C] and (H, W) -> [B, H * W, C]."""
        attn: Any = self.attn
        attend = _own_keys if attn.sr is None else _pooled_keys
        backend = resolve("auto", "IdlePooledBlock")
        indices, branch = attend(x, size, self, num_kept(self.keep_ratio, x.shape[1]), backend)
        return finish(x, indices, branch, self, x.shape[0], backend)


def _pooled_keys(
    x: Tensor, size: tuple[int, int], block: Any, num_keep: int, backend: str
) -> tuple[Tensor | None, Tensor]:
    """Indices of the kept tokens [B, K], None if all are, and their attention branch [B, K, C]."""
    attn, indices = block.attn, None
    normed = block.norm1(x)
    pooled = attn.sr(normed.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)  # [B, cells, C]
    if num_keep < x.shape[1]:
        with torch.no_grad():
            scores = _shares(attn, normed, pooled, size)
        indices = ops.select_tokens(scores, num_keep, 0, backend=backend)
    query = linear(attn.q, gather(normed, indices, backend))
    return indices, _attend(attn, query, linear(attn.kv, attn.norm(pooled)))


def _own_keys(
    x: Tensor, size: tuple[int, int], block: Any, num_keep: int, backend: str
) -> tuple[Tensor | None, Tensor]:
    """``_pooled_keys`` where there is no pooling."""
    attn, indices, norm = block.attn, None, layer_norm_parameters(block.norm1)
    if num_keep == x.shape[1]:
        y = block.norm1(x)
    else:
        with torch.no_grad():
            normed = block.norm1(x)
            scores = (normed @ _direction(attn, normed).unsqueeze(2)).squeeze(2)  # [B, N]
        if norm is not None:
            indices, y = ops.select_gather_norm(x, scores, num_keep, 0, *norm, backend=backend)
        else:
            indices = ops.select_tokens(scores, num_keep, 0, backend=backend)
            y = block.norm1(gather(x, indices, backend))
    return indices, _attend(attn, linear(attn.q, y), linear(attn.kv, y))


def _direction(attn: Any, normed: Tensor) -> Tensor:
    """W_k^T of the mean query: normed [B, N, C] -> [B, C]."""
    query = F.linear(normed.mean(1), attn.q.weight, attn.q.bias)
    return query @ attn.kv.weight[: attn.dim]


def _shares(attn: Any, normed: Tensor, pooled: Tensor, size: tuple[int, int]) -> Tensor:
    """Each token's share of the mean logit of its cell: normed [B, H * W, C], pooled [B, cells, C] -> [B, H * W]."""
    (H, W), R, C = size, attn.sr_ratio, attn.dim
    rows, columns = H // R, W // R
    direction = _direction(attn, normed) * attn.norm.weight
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


def _attend(attn: Any, query: Tensor, key_value: Tensor) -> Tensor:
    """query [B, K, C], key_value [B, keys, 2C] -> [B, K, C]."""
    query = query.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    key, value = key_value.unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attn.proj_drop(linear(attn.proj, out.transpose(1, 2).flatten(2)))


IDLE_BLOCK = IdlePooledBlock


def find(model: Any) -> nn.Module | None:
    """The Twins model (itself, or what ``features_only`` wraps), or PVT v2, to be refused; None if there is none."""
    timm_twins = sys.modules.get("timm.models.twins")
    if timm_twins is None:  # no timm model can exist
        return None
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    if type(model).__name__ == "FeatureGetterNet":
        model = model.model
    return model if isinstance(model, (timm_twins.Twins, PyramidVisionTransformerV2)) else None


def blocks(model: Any) -> list[nn.Module]:
    return [block for stage in model.blocks for block in stage]


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    put_blocks(model.blocks, blocks)


def num_prefix_tokens(model: nn.Module) -> int:
    return 0


def default_scorer(model: nn.Module) -> str:
    return "mean"


def reasons(model: nn.Module) -> list[str]:
    """Why this model cannot idle; empty if it can."""
    from timm.models.pvt_v2 import PyramidVisionTransformerV2
    from timm.models.twins import Block, GlobalSubSampleAttn, LocallyGroupedAttn

    if isinstance(model, PyramidVisionTransformerV2):
        return ["its MLP mixes neighbours by a depthwise convolution, so no token can be computed without those around"]
    found: dict[str, None] = {}  # ordered, once each
    block: Any
    for block in blocks(model):
        if isinstance(block, IdleBlock):
            continue
        attn = block.attn
        if type(block) is not Block:
            found[f"its blocks are {type(block).__name__}, whose forward is not known"] = None
        elif type(attn) is LocallyGroupedAttn:
            found["it is a Twins-SVT, whose locally grouped attention (LocallyGroupedAttn) is not supported"] = None
        elif type(attn) is not GlobalSubSampleAttn:
            found[f"its attention is {type(attn).__name__}, which is not timm's GlobalSubSampleAttn"] = None
        elif not (isinstance(attn.q, nn.Linear) and isinstance(attn.kv, nn.Linear)):
            found["its queries and keys are not projected by Linear layers"] = None
    return list(found)
