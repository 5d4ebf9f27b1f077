"""The idle block: score, select, gather, attend, MLP, scatter (arXiv 2310.05654, section 3).

K of the N image tokens of each image, and all prefix tokens, go through attention and MLP in a compact buffer; all
others pass to the output unchanged, at their old place. This equals the paper's training form (full attention with idle
keys masked, both branches multiplied by the 0/1 mask) in value and in gradient, so training runs compact as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import dense, inference, ops
from .backends import resolve
from .cut_attention import check_cut, cut_attention
from .dense import plain, plain_linear
from .errors import type_error, value_error
from .functional import check_counts, check_integer, check_tensor, check_writable
from .reference.layer_norm import accumulate_dtype
from .schedule import check_ratio, num_kept
from .scoring import check_scorer, layer_norm_parameters, query_projection, score_tokens, select_tokens

_PARTS = ("norm1", "attn", "norm2", "mlp")
_ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "num_heads")
# Parameters outside any sub-module whose use is known: LayerScale and biases of queries and values in EVA's blocks.
_OWN_PARAMETERS = {"gamma_1", "gamma_2", "q_bias", "v_bias"}
_REFUSED = {
    "ResPostBlock": "it normalises after the branch (post-norm), so a kept token's branch input is not normalised",
    "ParallelScalingBlock": "it computes attention and MLP in parallel from one norm",
    "DiffParallelScalingBlock": "it computes attention and MLP in parallel from one norm",
    "ParallelThingsBlock": "it holds several attentions and MLPs in parallel",
    "EvaBlockPostNorm": "it normalises after the branch (post-norm), so a kept token's branch input is not normalised",
}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def idle_block(
    x: Tensor,
    block: nn.Module,
    num_keep: int,
    num_prefix_tokens: int = 1,
    scorer: str = "auto",
    inplace: bool = False,
    return_indices: bool = False,
    backend: str = "auto",
    cut: str | None = None,
    rope: Tensor | None = None,
) -> Any:
    """One pre-norm transformer block on the ``num_keep`` most relevant image tokens; the others idle.

    Equivalent PyTorch, with ``idx`` from the class token's mean attention logits:
    ``y = gather(x, idx); y = y + ls1(attn(norm1(y))); y = y + ls2(mlp(norm2(y))); scatter(x, idx, y)``.

    Args:
        x: tokens [B, T, C], prefix tokens first.
        block: a timm-style pre-norm block with ``norm1``, ``attn`` (with ``qkv``, ``q_norm``, ``k_norm`` and
            ``num_heads``), ``norm2`` and ``mlp``; ``ls1``, ``ls2``, ``drop_path1`` and ``drop_path2`` if it has them;
            or timm's EvaBlock.
        num_keep: K, 1 <= K <= N = T - num_prefix_tokens.
        num_prefix_tokens: P; prefix tokens never idle.
        scorer: "cls" (logits of the first token), "mean" (column mean of all logits), "auto" (cls if P > 0).
        inplace: write the result into x. Everything that shares its memory changes; not while gradients are recorded.
        return_indices: also return the indices of the computed tokens, [B, P + K] int64, ascending.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        cut: for training, also return the token cut loss of this kind, as in ``token_cut_loss``; "none": 0 at no cost.
        rope: for a block with rotary attention, the embedding of all N image tokens as timm makes it, sines before
            cosines: [N, D], [H, N, D] or, for each image, [B, 1 or H, N, D]. Those of the kept tokens are gathered, and
            the real, rotated queries and keys score.

    Returns:
        [B, T, C], or that and the indices; with ``cut``: [B, T, C], the token cut loss (a scalar), the indices. Rows of
        idle tokens equal those of x bit for bit.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        BackendError: a named backend cannot run the call.
    """
    if cut is None and rope is None:
        done = inference.run(x, block, num_keep, num_prefix_tokens, scorer, inplace, resolve(backend, "idle_block"))
        if done is not None:
            out, indices = done
            return (out, _all_indices(x) if indices is None else indices) if return_indices else out
    check_tensor("idle_block", "x", x, "[B, T, C]", (None, None, None))
    check_counts("idle_block", x.shape[1], num_keep, num_prefix_tokens)
    scorer = check_scorer("idle_block", scorer, num_prefix_tokens)
    _check_block("idle_block", block)
    parts: Any = block.parts() if isinstance(block, IdleBlock) else block
    weight: Any = getattr(parts.norm1, "weight", None)
    if weight is not None and weight.shape[-1] != x.shape[2]:
        raise value_error("idle_block", "x", f"[B, T, C] with the block's C = {weight.shape[-1]} channels", x)
    if weight is not None and weight.device != x.device:
        raise value_error("idle_block", "x", f"on {weight.device}, where the block is", x)
    query: Any = query_projection(parts.attn)
    if plain_linear(query) and query.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise type_error("idle_block", "x", f"of the block's dtype, {query.weight.dtype}, or under autocast", x)
    if rope is not None:
        _check_rope("idle_block", rope, parts.attn, x, num_prefix_tokens)
    if inplace:
        check_writable("idle_block", x)
    if inplace and torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        raise value_error("idle_block", "inplace", "False while gradients are recorded (or use torch.no_grad)", inplace)
    if cut is not None:
        check_cut("idle_block", parts.attn, cut)
    backend = resolve(backend, "idle_block")
    out, token_cut, indices = _idle(x, parts, num_keep, num_prefix_tokens, scorer, inplace, backend, cut, rope)
    if cut is not None:
        return out, token_cut, indices
    return (out, indices) if return_indices else out


def unfit(block: Any) -> str | None:
    """Why the block's formula is not the one this file computes; None as far as that cannot be seen."""
    part: Any
    for part in (block, getattr(block, "attn", None)):
        name = type(part).__name__
        if name in _REFUSED:
            return f"{name}: {_REFUSED[name]}"
        unknown = set(getattr(part, "_parameters", ())) - _OWN_PARAMETERS
        if unknown:
            return f"{name} has parameters of its own ({', '.join(sorted(unknown))}), whose use is not known"
    missing = [name for name in _PARTS if not hasattr(block, name)]
    missing += [f"attn.{name}" for name in _ATTENTION_PARTS if not missing and not hasattr(block.attn, name)]
    return f"{type(block).__name__} has no {', '.join(missing)}" if missing else None


def _check_block(op: str, block: Any) -> None:
    if isinstance(block, IdleBlock):  # checked when it was made
        return
    reason = unfit(block)
    if reason is not None:
        raise TypeError(f"{op}: block must be a pre-norm block as timm's Block is, got {reason}")


def _check_rope(op: str, rope: Tensor, attn: Any, x: Tensor, num_prefix_tokens: int) -> None:
    unrotated = getattr(attn, "num_prefix_tokens", None)
    if unrotated is None:
        raise value_error(op, "rope", f"None: the block's {type(attn).__name__} takes no rotary embedding", rope)
    if unrotated != num_prefix_tokens:
        raise value_error(
            op, "num_prefix_tokens", f"{unrotated}, as many as its attention does not rotate", num_prefix_tokens
        )
    dims = min(max(rope.dim(), 2), 4) if isinstance(rope, Tensor) else 2
    check_tensor(op, "rope", rope, "[..., N, D]", (None,) * dims)
    if rope.shape[-2] != x.shape[1] - num_prefix_tokens:
        raise value_error(op, "rope", f"[..., N, D] with the N = {x.shape[1] - num_prefix_tokens} image tokens", rope)


def _gather_rope(rope: Tensor, indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """The embedding of the image tokens at the indices [B, P + K]: [B, 1 or H, K, D]."""
    kept = indices[:, num_prefix_tokens:] - num_prefix_tokens
    if rope.dim() == 2:
        return rope[kept].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, kept].transpose(0, 1)
    return rope.gather(2, kept[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def _dense(x: Tensor, block: Any, backend: str, rope: Tensor | None) -> Tensor:
    """The block on all tokens: nothing to score, gather or scatter."""
    branch, gamma, scale = _scale_and_drop(dense.attention(block.attn, block.norm1(x), backend, rope), block, 1)
    x = torch.add(x, branch if gamma is None else gamma * branch, alpha=scale)
    branch, gamma, scale = _scale_and_drop(dense.mlp(block.mlp, block.norm2(x), backend), block, 2)
    return torch.add(x, branch if gamma is None else gamma * branch, alpha=scale)


def _all_indices(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _idle(
    x: Tensor,
    block: Any,
    num_keep: int,
    num_prefix_tokens: int,
    scorer: str,
    inplace: bool,
    backend: str,
    cut: str | None,
    rope: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    # Nothing crosses the cut where no token idles.
    token_cut = None if cut is None else x.new_zeros((), dtype=accumulate_dtype(x.dtype))
    if num_keep == x.shape[1] - num_prefix_tokens:
        out = _dense(x, block, backend, rope)
        return (x.copy_(out) if inplace else out), token_cut, _all_indices(x)

    if cut not in (None, "none"):
        scores = score_tokens(x, block, layer_norm_parameters(block.norm1), scorer, backend, rope)  # [B, T]
        indices = ops.select_tokens(scores, num_keep, num_prefix_tokens, backend=backend)  # [B, n]
        branch, token_cut = cut_attention(block.attn, block.norm1(x), indices, num_prefix_tokens, cut, backend, rope)
    else:
        # [B, n], [B, n, C]
        indices, y = select_tokens(x, block, num_keep, num_prefix_tokens, scorer, backend, rope)
        if rope is not None:
            rope = _gather_rope(rope, indices, num_prefix_tokens)
        branch = dense.attention(block.attn, y, backend, rope)  # [B, n, C]

    branch, gamma, scale = _scale_and_drop(branch, block, 1)
    norm2 = layer_norm_parameters(block.norm2)
    if norm2 is not None:
        tokens, y = ops.gather_add_norm(x, indices, branch, gamma, scale, *norm2, backend=backend)
    else:
        branch = branch if gamma is None else gamma * branch
        tokens = torch.add(ops.gather_tokens(x, indices, backend=backend), branch, alpha=scale)
        y = block.norm2(tokens)
    branch = dense.mlp(block.mlp, y, backend)  # [B, n, C]

    branch, gamma, scale = _scale_and_drop(branch, block, 2)
    if inplace:
        ops.scatter_add_tokens_(x, indices, tokens, branch, gamma, scale, backend=backend)
        return x, token_cut, indices
    return ops.scatter_add_tokens(x, indices, tokens, branch, gamma, scale, backend=backend), token_cut, indices


def _scale_and_drop(branch: Tensor, block: Any, i: int) -> tuple[Tensor, Tensor | None, float]:
    """The branch after stochastic depth, and what is left for the fused kernel to multiply it with.

    That is LayerScale's [C] or None, and a number. DropPath multiplies whole images and LayerScale whole channels, so
    their order does not matter.
    """
    scale, drop = getattr(block, f"ls{i}", None), getattr(block, f"drop_path{i}", None)
    commutes = drop is None or type(drop) is nn.Identity or plain(drop, "timm.layers.drop", "DropPath")
    gamma, factor = None, 1.0
    if scale is None:
        gamma = getattr(block, f"gamma_{i}", None)  # of timm's EvaBlock
    elif commutes and plain(scale, "timm.layers.layer_scale", "LayerScale"):
        gamma = scale.gamma
    elif commutes and plain(scale, "idlevit_kernels.models.lvvit", "Scale"):
        factor = scale.factor
    else:
        branch = scale(branch)
    if gamma is not None and not commutes:
        branch, gamma = gamma * branch, None
    return branch if drop is None else drop(branch), gamma, factor


def take_over(new: nn.Module, old: nn.Module) -> None:
    """The mode of ``old``, and its hooks: one dictionary for both, so that a hook and its handle work on either."""
    new.training = old.training
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


class IdleBlock(nn.Module):
    """A transformer block that computes a share of its image tokens and lets the others idle.

    Takes over the sub-modules of ``block`` under their own names, so state-dict keys do not change, and gives the block
    back in ``dense_block``. K follows the number of image tokens of each input: K = int(keep_ratio * N), at least 1.

    Args:
        block: as in ``idle_block``.
        keep_ratio: in (0, 1].
        num_prefix_tokens, scorer: as in ``idle_block``.
    """

    def __init__(self, block: nn.Module, keep_ratio: float, num_prefix_tokens: int = 1, scorer: str = "auto"):
        nn.Module.__init__(self)  # a subclass may be a layer of another library too, whose __init__ builds one anew
        self.check(block)
        check_integer("IdleBlock", "num_prefix_tokens", num_prefix_tokens)
        if num_prefix_tokens < 0:
            raise value_error("IdleBlock", "num_prefix_tokens", "at least 0", num_prefix_tokens)
        self.keep_ratio = check_ratio("IdleBlock", keep_ratio)
        self.num_prefix_tokens = num_prefix_tokens
        self.scorer = check_scorer("IdleBlock", scorer, num_prefix_tokens)
        for name, child in block._modules.items():  # named_children would leave out a part that has two names
            self.add_module(name, child)
        for name, parameter in block._parameters.items():
            self.register_parameter(name, parameter)
        take_over(self, block)
        self._block = (block,)  # in a tuple, so that it is no sub-module

    @staticmethod
    def check(block: nn.Module) -> None:
        """Raises TypeError, with the reason, if the block is not one that this class computes."""
        _check_block("IdleBlock", block)

    def parts(self) -> Any:
        """The modules by the names of timm's block; what ``idle_block`` computes with."""
        return self

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        inplace: bool = False,
        cut: str | None = None,
        rope: Tensor | None = None,
    ) -> Any:
        if attn_mask is not None:
            raise value_error("IdleBlock", "attn_mask", "None: idle tokens need full attention", attn_mask)
        if is_causal:
            raise value_error("IdleBlock", "is_causal", "False: idle tokens need full attention", is_causal)
        num_keep = num_kept(self.keep_ratio, x.shape[1] - self.num_prefix_tokens)
        return idle_block(x, self, num_keep, self.num_prefix_tokens, self.scorer, inplace, cut=cut, rope=rope)

    def hooked(self) -> bool:
        """Whether a hook or a replaced method sees its input or output."""
        return (
            bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)
            or "forward" in self.__dict__
        )

    def dense_block(self) -> nn.Module:
        """The block this was made from, with the present sub-modules."""
        (block,) = self._block
        for name, part in (*self._modules.items(), *self._parameters.items()):
            setattr(block, name, part)
        block.training = self.training
        return block

    def extra_repr(self) -> str:
        return f"keep_ratio={self.keep_ratio:g}, num_prefix_tokens={self.num_prefix_tokens}, scorer={self.scorer!r}"


class IdleSequential(nn.Sequential):
    """Consecutive blocks. Idle ones write into the output of the idle block before them where nobody else can see it.

    That saves a copy of all idle tokens in each layer. A caller who runs the blocks one by one, as feature extraction
    does, or who hooks a block, gets a new tensor from each.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_any_global_hook():
            return super().forward(x)
        owned = False  # x is a buffer that only this loop knows
        backend = resolve("auto", "idle_block")
        block: Any
        for block in self._modules.values():
            hooked = not isinstance(block, IdleBlock) or block.hooked()
            inplace = owned and not hooked and block.keep_ratio < 1
            done = None
            if not hooked:
                num_keep = num_kept(block.keep_ratio, x.shape[1] - block.num_prefix_tokens)
                done = inference.run(x, block, num_keep, block.num_prefix_tokens, block.scorer, inplace, backend)
            if done is not None:
                x, owned = done[0], True
            else:
                owned = not hooked and layer_norm_parameters(block.parts().norm1) is not None
                x = block(x, inplace=True) if inplace and owned else block(x)
        return x
