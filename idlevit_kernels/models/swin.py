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

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block.attention import attend, heads_apart
from ..block.context import Context
from ..block.linear import linear
from ..block.mlp import find_mlp
from ..block.parts import (
    Entered,
    Form,
    Parts,
    Watch,
    find_branch,
    find_kind,
    find_linear,
    find_norm,
    find_optional,
)
from ..errors import ArgumentTypeError, value_error
from ..ops.dtypes import accumulate_dtype
from ..ops.library import Calls
from .family import Family, outermost, places
from .grid import through_hooks, why_no_attention

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


@dataclasses.dataclass(frozen=True)
class WindowContext(Context):
    """The windows that tokens [B * windows, M^2, C] lie in; ``indices`` [B * windows, K] are those of the kept ones."""

    windows: Any = None
    indices: Tensor | None = None

    @property
    def pads(self) -> bool:
        return self.windows.image is not None

    def take(self, indices: Tensor, num_prefix_tokens: int) -> Context:
        return dataclasses.replace(self, indices=indices)

    def images(self, tokens: Tensor) -> int:
        return tokens.shape[0] // self.windows.count

    def padding_last(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.windows.of_batch(self.windows.image, scores), -math.inf)

    def zero_padding(self, normed: Tensor, indices: Tensor | None) -> Tensor:
        """timm normalises before it pads, so padding is zero; the norm of zero is not."""
        image = self.windows.of_batch(self.windows.image, normed)
        return normed * (image if indices is None else image.gather(1, indices))[..., None]


class Projected(NamedTuple):
    """Queries and keys of all tokens [B * windows, M^2, H * head_dim]; values, if one module gave them all."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    table: Tensor | None = None  # relative position bias, where a module computes it


class WindowAttention:
    """Swin's attention: relative position bias, and a mask between the regions of a shifted window."""

    cut_reason = "the token cut loss is not defined for windows"

    def __init__(self, module: Any, watch: Watch):
        look = watch.value
        self.module = module
        watch.is_own(module)
        self.watched = watch.is_watched(module)
        self.heads = look(module, "num_heads")
        self.qkv, self.proj = (find_linear(look(module, name), watch) for name in ("qkv", "proj"))
        self.proj_drop = find_optional(look(module, "proj_drop"), watch)
        softmax, drop = look(module, "softmax"), look(module, "attn_drop")
        fused = bool(look(module, "fused_attn"))  # PyTorch's attention reads the dropout's probability, and no more
        self.softmax = None if fused or watch.is_plain(softmax, "Softmax") else softmax
        self.drop = None if fused else find_optional(drop, watch)
        self.dropout = (look(drop, "p") or 0.0) if fused and look(module, "training") else 0.0
        self._look(module, look)

    def _look(self, module: Any, look: Callable[..., Any]) -> None:
        fused = look(module, "fused_attn")
        # PyTorch's fused attention, as timm calls it, has a scale of its own.
        self.scale = None if fused else look(module, "scale")
        for name in ("relative_position_bias_table", "relative_position_index"):
            look(module, name)

    @property
    def weight(self) -> Tensor | None:
        return self.qkv.weight

    def table(self, prepared: Projected | None) -> Tensor:
        """Relative position bias by offset, [offsets, H]."""
        return self.module.relative_position_bias_table

    def front(self, scorer: str, context: Context) -> None:
        return None

    def direction(self, scorer: str, context: Context, queries: Callable[[], Tensor]) -> None:
        return None  # each region of a window has its own

    def needs_all(self, context: Context) -> bool:
        return self.qkv.weight is None

    def prepare(self, normed: Tensor, context: Context) -> Projected:
        return Projected(*self.qkv(normed).chunk(3, dim=2))

    def scores(self, normed: Tensor, prepared: Projected | None, scorer: str, context: Any) -> Tensor:
        windows, scale = context.windows, self._scale(normed)
        if prepared is not None:
            logits = windows.region_means(prepared.q * scale) @ prepared.k.transpose(1, 2)
        else:
            assert self.qkv.weight is not None
            query_weight, key_weight, _ = self.qkv.weight.chunk(3)
            query_bias, key_bias, _ = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
            query = F.linear(windows.region_means(normed), query_weight, query_bias) * scale
            logits = query @ key_weight @ normed.transpose(1, 2)
            if key_bias is not None:  # the same for all tokens of a region, but regions of a window compete
                logits = logits + (query @ key_bias)[..., None]
        scores = self._biased(logits, windows, self.table(prepared))
        return context.padding_last(scores) if context.pads else scores

    def _scale(self, normed: Tensor) -> float:
        assert self.qkv.weight is not None or self.scale is not None
        if self.scale is not None:
            return self.scale
        return self.module.scale

    def _biased(self, logits: Tensor, windows: Windows, table: Tensor) -> Tensor:
        """Column mean of the biased logits, averaged over heads: [B * windows, regions, M^2] -> [B * windows, M^2].

        ``logits`` are those of the mean queries, summed over heads; the bias is averaged in the same way.
        """
        acc = accumulate_dtype(logits.dtype)
        bias = table.to(acc).mean(1)[self.module.relative_position_index]  # [M^2, M^2], row i biases query i
        bias = windows.region_means(bias.expand(windows.count, -1, -1))  # [windows, regions, M^2]
        by_image = logits.to(acc).unflatten(0, (-1, windows.count)) / self.heads
        return windows.own_region((by_image + bias).flatten(0, 1))

    def cut(self, *_: Any) -> Tensor:
        raise ArgumentTypeError(self.cut_reason)

    def __call__(self, y: Tensor, context: Any) -> Tensor:
        return self._in_module(y, context, self._attend)

    def _attend(self, y: Tensor, context: Any) -> Tensor:
        q, k, v = self.qkv(y).chunk(3, dim=2)
        return self._out(q, k, v, context, self.table(None))

    def among(self, y: Tensor, prepared: Projected, indices: Tensor, context: Context, calls: Calls) -> Tensor:
        def formula(y: Tensor, context: Any) -> Tensor:
            q, k = (calls.gather_tokens(t, indices) for t in prepared[:2])
            v = self._values(y) if prepared.v is None else calls.gather_tokens(prepared.v, indices)
            return self._out(q, k, v, context, self.table(prepared))

        return self._in_module(y, context, formula)

    def _in_module(self, y: Tensor, context: Any, formula: Callable[..., Tensor]) -> Tensor:
        if not self.watched:
            return formula(y, context)
        return through_hooks(self.module, lambda y: formula(y, context), y)

    def _values(self, y: Tensor) -> Tensor:
        raise AssertionError("one module gives queries, keys and values")

    def _out(self, q: Tensor, k: Tensor, v: Tensor, context: Any, table: Tensor) -> Tensor:
        """[B * windows, K, H * head_dim] each -> [B * windows, K, C]."""
        head_dim = q.shape[2] // self.heads
        mask = self._mask(context.windows, context.indices, q, table)
        q, k, v = (heads_apart(t, head_dim) for t in (q, k, v))
        out = self.proj(attend(q, k, v, mask, self._attention_scale(), self.dropout, self.softmax, self.drop))
        return out if self.proj_drop is None else self.proj_drop(out)

    def _attention_scale(self) -> float | None:
        return self.scale

    def _mask(self, windows: Windows, indices: Tensor | None, query: Tensor, table: Tensor) -> Tensor:
        """Relative position bias and mask of the kept tokens: [B * windows or 1, H, K, K], dtype of the queries."""
        index, regions = self.module.relative_position_index, windows.regions
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


class CosineWindowAttention(WindowAttention):
    """Swin V2's: queries and keys of length 1, a temperature for each head, and a bias that an MLP computes."""

    def _look(self, module: Any, look: Callable[..., Any]) -> None:
        names = ("q_bias", "k_bias", "v_bias", "logit_scale", "relative_coords_table", "relative_position_index")
        for name in (*names, "cpb_mlp"):
            look(module, name)
        if look(module, "q_bias") is not None and not look(module, "qkv_bias_separate"):
            self.qkv = self.qkv.read()  # as timm's forward does, which does not call the module

    def table(self, prepared: Projected | None) -> Tensor:
        assert prepared is not None and prepared.table is not None
        return prepared.table

    def needs_all(self, context: Context) -> bool:
        return True

    def _bias(self) -> Tensor | None:
        module = self.module
        return None if module.q_bias is None else torch.cat((module.q_bias, module.k_bias, module.v_bias))

    def prepare(self, normed: Tensor, context: Context) -> Projected:
        qkv, bias, v = self.qkv, self._bias(), None
        if qkv.plain and qkv.weight is not None:  # values are needed for kept tokens only
            width = 2 * (qkv.weight.shape[0] // 3)
            q, k = linear(normed, qkv.weight[:width], None if bias is None else bias[:width]).chunk(2, dim=2)
        else:
            q, k, v = (qkv(normed) if bias is None else qkv(normed) + bias).chunk(3, dim=2)
        temperature = self.module.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1)  # [H, 1]
        q, k = (F.normalize(t.unflatten(2, (self.heads, -1)), dim=-1) for t in (q, k))
        raw = self.module.cpb_mlp(self.module.relative_coords_table)
        table = 16 * torch.sigmoid(raw.view(-1, self.heads))
        return Projected((q * temperature).flatten(2), k.flatten(2), v, table)

    def _values(self, y: Tensor) -> Tensor:
        weight, bias = self.qkv.weight, self._bias()
        assert weight is not None
        width = 2 * (weight.shape[0] // 3)
        return linear(y, weight[width:], None if bias is None else bias[width:])

    def _attend(self, y: Tensor, context: Any) -> Tensor:
        prepared = self.prepare(y, context)
        v = self._values(y) if prepared.v is None else prepared.v
        return self._out(prepared.q, prepared.k, v, context, self.table(prepared))

    def _scale(self, normed: Tensor) -> float:
        return 1.0

    def _attention_scale(self) -> float | None:
        return 1.0


class WindowForm(Form):
    """Swin's block on a grid [B, H, W, C]: x + attn(norm1(x)), then x + mlp(norm2(x)), in windows."""

    kinds: tuple[str | type, ...] = ("SwinTransformerBlock",)
    sequence = False
    alone = None
    attention_name, attention, post_norm = "WindowAttention", WindowAttention, False

    def why_unsupported(self, block: Any) -> str | None:
        return why_no_attention(block.attn, self.attention_name)

    def parts(self, block: Any, watch: Watch) -> Parts:
        norms = [find_norm(watch.value(block, name), watch) for name in ("norm1", "norm2")]
        drops = [watch.value(block, f"drop_path{i}") for i in (1, 2)]
        attention, mlp = self.attention(watch.value(block, "attn"), watch), find_mlp(watch.value(block, "mlp"), watch)
        before, after = ([None, None], norms) if self.post_norm else (norms, [None, None])
        branches = [find_branch(watch, drop, norm=norm) for drop, norm in zip(drops, after, strict=True)]
        return Parts(before[0], attention, branches[0], before[1], mlp, branches[1], watch, self)

    def enter(self, block: Any, x: Tensor, context: Context) -> Entered:
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise value_error(type(block).__name__, "x", "a grid of tokens [B, H, W, C]", x)
        windows = Windows((x.shape[1], x.shape[2]), block.window_size, block.shift_size, x.device)
        return windows.split(x), WindowContext(windows=windows), windows.join


class PostNormWindowForm(WindowForm):
    """Swin V2's block: x + norm1(attn(x)), then x + norm2(mlp(x)), in windows."""

    kinds = ("SwinTransformerV2Block",)
    attention_name, attention, post_norm = "WindowAttentionV2", CosineWindowAttention, True


class SwinTransformers(Family):
    name = "timm SwinTransformer, SwinTransformerV2"
    forms = (WindowForm(), PostNormWindowForm())

    def find(self, model: nn.Module) -> list[Any]:
        """The models; of what ``features_only`` makes of them, a container of stages, the container."""
        models = tuple(k for k in map(find_kind, ("SwinTransformer", "SwinTransformerV2")) if k is not None)

        def holds(module: nn.Module) -> bool:
            kept = type(module).__name__ in ("FeatureListNet", "FeatureDictNet") and bool(_stages(module))
            return kept or isinstance(module, models)

        return outermost(model, holds) if models else []

    def blocks(self, place: Any) -> list[nn.Module]:
        return [block for stage in _stages(place) for block in stage.blocks]

    def num_prefix_tokens(self, place: Any) -> int:
        return 0


def _stages(place: nn.Module) -> list[Any]:
    return places(place, "SwinTransformerStage", "SwinTransformerV2Stage")
