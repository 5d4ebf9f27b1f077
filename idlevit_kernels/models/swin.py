"""timm's Swin Transformer (arXiv 2103.14030) and Swin Transformer V2 (arXiv 2111.09883).

Every window is an image of its own: of its M^2 tokens K = int(keep_ratio * M^2), at least 1, go through attention and
MLP, the others pass to the output at their old place. The grid stays whole, so patch merging and feature pyramids see
what they always see. Relative position bias and the mask of shifted windows are gathered for the kept tokens.

The score is the column mean of the logits as the softmax sees them, biased, averaged over heads: s_j = mean_i (1/H)
sum_h (scale q_i^h . k_j^h + bias_ij^h), where i runs over the image tokens that may attend to j. In a shifted window
those are the tokens of the same region, so each region has its mean query. In V1 keys are linear in the normalised
token, so a mean query gives a direction that scores all tokens (see ``scoring``); in V2 queries and keys are normalised
for each head, and the real ones score.

Padding, where the window does not divide the grid, is computed as timm does: tokens that are zero after the norm and
that others attend to. In an idle layer it ranks below every image token and does not count in the mean, so it is kept
only where a window has fewer than K image tokens.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import dense, ops
from ..backends import resolve
from ..block import IdleBlock
from ..dense import plain_linear
from ..reference.layer_norm import accumulate_dtype
from ..schedule import num_kept
from ..scoring import layer_norm_parameters
from .grid import IdleGridBlock, drop, finish, gather, linear, put_blocks, scatter_add

NAME = "timm SwinTransformer, SwinTransformerV2"

Size = tuple[int, int]
_OUTSIDE = -100.0  # what timm adds to the logits of tokens of different regions


class Windows:
    """How a grid of tokens falls into windows.

    Args:
        grid: height and width H, W of the tokens.
        window: height and width of a window, M^2 tokens in all.
        shift: of the grid before it is cut, upwards and to the left.
        device: of the tokens.

    Attributes:
        regions: which region of its window each token belongs to, 0 to 3, [windows, M^2]; None without a shift. The
            shift brings tokens of opposite edges of the image into one window; they do not attend to each other.
        count: windows of an image.
        image: whether each token is one of the image, [windows, M^2]; None without padding.
    """

    def __init__(self, grid: Size, window: Size, shift: Size, device: torch.device):
        self.grid, self.window, self.shift = grid, window, shift
        self.padding = -grid[0] % window[0], -grid[1] % window[1]
        self.padded, self.shifted = any(self.padding), any(shift)
        self.height, self.width = grid[0] + self.padding[0], grid[1] + self.padding[1]
        self.count = (self.height // window[0]) * (self.width // window[1])
        row, column = torch.arange(self.height, device=device)[:, None], torch.arange(self.width, device=device)
        self.regions, self.image = None, None
        if self.shifted:
            bottom, right = row >= self.height - shift[0], column >= self.width - shift[1]
            self.regions = self._cut((2 * bottom + right)[None, ..., None]).flatten(1)
        if self.padded:
            self.image = self._cut(((row < grid[0]) & (column < grid[1]))[None, ..., None]).flatten(1)

    def _cut(self, x: Tensor) -> Tensor:
        (h, w), (B, H, W, C) = self.window, x.shape
        return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h * w, C)

    def split(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B * windows, M^2, C], zeros where it pads."""
        if self.shifted:
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        if self.padded:
            x = F.pad(x, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        return self._cut(x)

    def join(self, tokens: Tensor) -> Tensor:
        """The inverse of ``split``; drops the padding."""
        (h, w), C = self.window, tokens.shape[2]
        x = tokens.reshape(-1, self.height // h, self.width // w, h, w, C).transpose(2, 3)
        x = x.reshape(-1, self.height, self.width, C)
        if self.padded:
            x = x[:, : self.grid[0], : self.grid[1]].contiguous()
        return x.roll(self.shift, (1, 2)) if self.shifted else x

    def region_means(self, tokens: Tensor) -> Tensor:
        """The mean image token of each region: [B * windows, M^2, ...] -> [B * windows, regions, ...].

        ``[windows, M^2, C]`` may stand for what is the same in every image. Regions without tokens give zero.
        """
        if self.regions is not None:
            members = self.regions[:, None] == torch.arange(4, device=tokens.device)[:, None]
            if self.image is not None:
                members = members & self.image[:, None]
        elif self.image is not None:
            members = self.image[:, None]
        else:
            return tokens.mean(1, keepdim=True)
        count = members.sum(2, keepdim=True).clamp(min=1)  # [windows, regions, 1]
        grouped = tokens.unflatten(0, (-1, members.shape[0]))
        return (members.to(tokens.dtype) @ grouped / count).flatten(0, 1)

    def own_region(self, values: Tensor) -> Tensor:
        """What its own region says of each token: [B * windows, regions, M^2] -> [B * windows, M^2]."""
        if self.regions is None:
            return values.squeeze(1)
        return values.gather(1, self.of_batch(self.regions, values)[:, None]).squeeze(1)

    def of_batch(self, t: Tensor, like: Tensor) -> Tensor:
        """[windows, M^2] -> [B * windows, M^2], with the B of ``like`` [B * windows, ...]."""
        return t.repeat(like.shape[0] // t.shape[0], 1)


class IdleWindowBlock(IdleGridBlock):
    """A Swin block that computes K tokens of each window and lets the others idle.

    K = int(keep_ratio * M^2), at least 1 and at most the M^2 tokens of a window: timm cuts windows down to a smaller
    grid, and K with them.

    Args:
        block: timm's SwinTransformerBlock or SwinTransformerV2Block.
        keep_ratio, num_prefix_tokens, scorer: as in ``IdleGridBlock``.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, H, W, C] -> [B, H, W, C]."""
        block: Any = self._block[0]
        num_keep = num_kept(self.keep_ratio, block.window_area)
        _, H, W, _ = x.shape
        windows = Windows((H, W), block.window_size, block.shift_size, x.device)
        compute = _pre_norm if hasattr(self.attn, "relative_position_bias_table") else _post_norm
        return windows.join(compute(x, self, windows, num_keep, resolve("auto", "IdleWindowBlock")))

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        block: Any = self._block[0]
        block.set_input_size(*args, **kwargs)

    def init_non_persistent_buffers(self) -> None:
        block: Any = self._block[0]
        block.init_non_persistent_buffers()


def _pre_norm(x: Tensor, block: Any, windows: Windows, num_keep: int, backend: str) -> Tensor:
    """V1: x + attn(norm1(x)), then x + mlp(norm2(x)). x [B, H, W, C] -> [B * windows, M^2, C]."""
    attn = block.attn
    tokens = windows.split(x)
    norm1 = layer_norm_parameters(block.norm1)
    table = attn.relative_position_bias_table  # [offsets, H]

    # Padding is zero after the norm, which is not the norm of zero: then all tokens are normalised before the cut.
    fused = norm1 is not None and not windows.padded and num_keep < tokens.shape[1]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not fused):
        normed = windows.split(block.norm1(x)) if windows.padded else block.norm1(tokens)
    indices, y = None, normed
    if num_keep < tokens.shape[1]:
        with torch.no_grad():
            scores = _scores(attn, table, windows, _mean_logits(attn, windows, normed))
        if fused and norm1 is not None:
            indices, y = ops.select_gather_norm(tokens, scores, num_keep, 0, *norm1, backend=backend)
        else:
            indices = ops.select_tokens(scores, num_keep, 0, backend=backend)  # [B * windows, K]
            y = ops.gather_tokens(normed, indices, backend=backend)

    query, key, value = linear(attn.qkv, y).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
    mask = _mask(attn, table, windows, indices, query)
    branch = _attend(attn, query, key, value, mask, attn.scale)  # [B * windows, K, C]
    return finish(tokens, indices, branch, block, x.shape[0], backend)


def _mean_logits(attn: Any, windows: Windows, normed: Tensor) -> Tensor:
    """Logits of each region's mean query, summed over heads: [B * windows, M^2, C] -> [B * windows, regions, M^2]."""
    if plain_linear(attn.qkv):
        query_weight, key_weight, _ = attn.qkv.weight.chunk(3)
        query_bias, key_bias, _ = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        query = F.linear(windows.region_means(normed), query_weight, query_bias) * attn.scale
        logits = query @ key_weight @ normed.transpose(1, 2)
        # The same for all tokens of a region, but regions of a window compete.
        return logits if key_bias is None else logits + (query @ key_bias)[..., None]
    query, key, _ = attn.qkv(normed).chunk(3, dim=2)
    return windows.region_means(query * attn.scale) @ key.transpose(1, 2)


def _post_norm(x: Tensor, block: Any, windows: Windows, num_keep: int, backend: str) -> Tensor:
    """V2: x + norm1(attn(x)), then x + norm2(mlp(x)). x [B, H, W, C] -> [B * windows, M^2, C]."""
    attn = block.attn
    tokens = windows.split(x)
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))  # [offsets, H]

    qkv, width = attn.qkv, 2 * attn.dim
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if plain_linear(qkv):  # values are needed for kept tokens only
        projected = dense.linear(tokens, qkv.weight[:width], None if bias is None else bias[:width])
    else:
        projected = qkv(tokens) if bias is None else qkv(tokens) + bias
    query, key = projected[..., :width].unflatten(2, (2, attn.num_heads, -1)).unbind(2)  # [B * windows, M^2, H, d]
    temperature = attn.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1)  # [H, 1]
    query, key = (F.normalize(query, dim=-1) * temperature).flatten(2), F.normalize(key, dim=-1).flatten(2)
    indices = None
    if num_keep < tokens.shape[1]:
        with torch.no_grad():
            scores = _scores(attn, table, windows, windows.region_means(query) @ key.transpose(1, 2))
        indices = ops.select_tokens(scores, num_keep, 0, backend=backend)  # [B * windows, K]
    kept, query, key = (gather(t, indices, backend) for t in (tokens, query, key))
    if plain_linear(qkv):
        value = dense.linear(kept, qkv.weight[width:], None if bias is None else bias[width:])
    else:
        value = gather(projected[..., width:], indices, backend)

    query, key, value = (t.unflatten(2, (attn.num_heads, -1)) for t in (query, key, value))
    mask = _mask(attn, table, windows, indices, query)
    branch = block.norm1(_attend(attn, query, key, value, mask, 1.0))  # [B * windows, K, C]
    kept = kept + drop(block.drop_path1, branch, x.shape[0])
    branch = drop(block.drop_path2, block.norm2(dense.mlp(block.mlp, kept, backend)), x.shape[0])
    return scatter_add(tokens, indices, kept, branch, backend)


def _scores(attn: Any, table: Tensor, windows: Windows, logits: Tensor) -> Tensor:
    """Column mean of the biased logits, averaged over heads: [B * windows, regions, M^2] -> [B * windows, M^2].

    ``logits`` are those of the mean queries, summed over heads; the bias is averaged in the same way.
    """
    acc = accumulate_dtype(logits.dtype)
    bias = table.to(acc).mean(1)[attn.relative_position_index]  # [M^2, M^2], row i biases the query i
    bias = windows.region_means(bias.expand(windows.count, -1, -1))  # [windows, regions, M^2]
    by_image = logits.to(acc).unflatten(0, (-1, windows.count)) / attn.num_heads
    scores = windows.own_region((by_image + bias).flatten(0, 1))
    if windows.image is not None:
        scores = scores.masked_fill(~windows.of_batch(windows.image, scores), -math.inf)
    return scores


def _mask(attn: Any, table: Tensor, windows: Windows, indices: Tensor | None, query: Tensor) -> Tensor:
    """Relative position bias and mask of the kept tokens: [B * windows or 1, H, K, K] of the dtype of the queries."""
    index, regions = attn.relative_position_index, windows.regions
    if regions is not None:
        regions = windows.of_batch(regions, query)  # [B * windows, M^2]
    if indices is None:
        index = index.unsqueeze(0)
    else:
        first = index[:, 0][indices]  # what i adds to index[i, j]; j takes off the same
        index = first[:, :, None] - first[:, None, :] + index[0, 0]
        regions = None if regions is None else regions.gather(1, indices)
    mask = F.embedding(index, table.to(query.dtype)).permute(0, 3, 1, 2)
    if regions is not None:
        mask = mask + (regions[:, :, None] != regions[:, None, :]).unsqueeze(1) * _OUTSIDE
    return mask


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query, key, value [B * windows, K, H, head_dim] -> [B * windows, K, C]."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return attn.proj_drop(linear(attn.proj, out.transpose(1, 2).flatten(2)))


def _stages(model: nn.Module) -> list[Any]:
    names = "SwinTransformerStage", "SwinTransformerV2Stage"
    return [m for m in model.modules() if type(m).__name__ in names and type(m).__module__.startswith("timm.models.")]


IDLE_BLOCK = IdleWindowBlock


def find(model: Any) -> nn.Module | None:
    """The model itself if it is a SwinTransformer, of either version, or what ``features_only`` made of one."""
    timm_swin = sys.modules.get("timm.models.swin_transformer")
    if timm_swin is None:  # no timm model can exist
        return None
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    if isinstance(model, (timm_swin.SwinTransformer, SwinTransformerV2)):
        return model
    return model if type(model).__name__ in ("FeatureListNet", "FeatureDictNet") and _stages(model) else None


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in _stages(model) for block in stage.blocks]


def set_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    put_blocks([stage.blocks for stage in _stages(model)], blocks)


def num_prefix_tokens(model: nn.Module) -> int:
    return 0


def default_scorer(model: nn.Module) -> str:
    return "mean"


def reasons(model: nn.Module) -> list[str]:
    """Why this model cannot idle; empty if it can."""
    from timm.models import swin_transformer, swin_transformer_v2

    known = {
        swin_transformer.SwinTransformerBlock: swin_transformer.WindowAttention,
        swin_transformer_v2.SwinTransformerV2Block: swin_transformer_v2.WindowAttention,
    }
    found: dict[str, None] = {}  # ordered, once each
    block: Any
    for block in blocks(model):
        if isinstance(block, IdleBlock):
            continue
        attention = known.get(type(block))
        if attention is None:
            found[f"its blocks are {type(block).__name__}, whose forward is not known"] = None
        elif type(block.attn) is not attention:
            found[f"its attention is {type(block.attn).__name__}, which is not timm's WindowAttention"] = None
    return list(found)
