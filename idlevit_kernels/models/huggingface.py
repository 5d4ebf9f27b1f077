"""ViT, DeiT and DINOv2 (with and without registers) of the Hugging Face transformers library, alone or within a model.

An idle layer is an instance of the layer's class, because that is how transformers finds the layers whose outputs are
``hidden_states`` and those whose activations it recomputes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..block.attention import CalledAttention, Projected, attend, check_branch, heads_apart, heads_together
from ..block.context import Context
from ..block.parts import Form, Parts, Watch, find_branch, find_kind, find_norm
from ..errors import value_error
from ..ops.library import Calls, transformed
from .family import Family, outermost, places

# Class of a layer, and the prefix tokens of its model, registers apart.
_LAYERS = {"ViTLayer": 1, "DeiTLayer": 2, "Dinov2Layer": 1, "Dinov2WithRegistersLayer": 1}


class LayerAttention(CalledAttention):
    """The attention of such a layer, called on the kept tokens; its projections are read for the scores."""

    def __init__(self, module: Any, watch: Watch):
        heads = watch.value(module, "num_attention_heads")
        super().__init__(module, watch, heads, tuple(_part(module, f"{name}_proj", watch) for name in "qkv"))
        self.cut_reason = "transformers' attention has none"
        self.mask_heads = heads
        # Where the keys of all tokens had to be computed, those of the kept ones are used again.
        kind = getattr(watch.value(module, "config"), "_attn_implementation", None)
        self.flex, again = kind == "flex_attention", self.own and not self.watched and kind in ("sdpa", "eager")
        self.output = watch.value(module, "o_proj") if again else None
        self.calls_projections = again
        self.scale = watch.value(module, "scaling")
        self.dropout = (watch.value(module, "attention_dropout") or 0.0) if watch.value(module, "training") else 0.0

    def call(self, y: Tensor, context: Context) -> Tensor:
        mask: Any = context.mask
        if mask is not None and self.flex:
            mask = _block_mask(mask)
        out = self.module(y) if mask is None else self.module(y, mask)
        return check_branch(self.module, out[0] if isinstance(out, tuple) else out, y)

    def among(self, y: Tensor, prepared: Projected, indices: Tensor, context: Context, calls: Calls) -> Tensor:
        if self.output is None:
            return self.call(y, context)
        q, k = (calls.gather_tokens(heads_together(t), indices) for t in prepared[:2])
        q, k, v = (heads_apart(t, prepared.q.shape[3]) for t in (q, k, self.separate[2](y)))
        return self.output(attend(q, k, v, context.mask, self.scale, self.dropout))


class LayerForm(Form):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the names that transformers gives the parts."""

    kinds = tuple(_LAYERS)
    alone = None

    def why_unsupported(self, layer: Any) -> str | None:
        try:
            self.parts(layer, Watch())
        except AttributeError as error:
            return f"{type(layer).__name__} laid out as in no version of transformers that is known here: {error}"
        return None

    def parts(self, layer: Any, watch: Watch) -> Parts:
        dinov2 = hasattr(layer, "norm1")
        drop = _part(layer, "drop_path" if dinov2 else "dropout", watch)
        names = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
        norm1, norm2 = (find_norm(_part(layer, name, watch), watch) for name in names)
        scales = [_part(layer, f"layer_scale{i}", watch) if dinov2 else None for i in (1, 2)]
        attention, mlp = LayerAttention(_part(layer, "attention", watch), watch), _part(layer, "mlp", watch)
        watch.is_own(mlp)
        watch.is_watched(mlp)
        branches = [find_branch(watch, drop, scale) for scale in scales]
        return Parts(norm1, attention, branches[0], norm2, mlp, branches[1], watch, self)

    def context(self, block: Any, attention_mask: Any = None, *_: Any, **kwargs: Any) -> Context:
        """``kwargs`` are what a transformers model hands down to all of its layers."""
        if kwargs.get("output_attentions", block.attention.config.output_attentions):
            expected = "False, or the model dense (remove_idle): what idle tokens attend to does not exist"
            raise value_error("IdleBlock", "output_attentions", expected, True)
        mask = None if attention_mask is None else _find_mask(attention_mask)
        return Context.NOTHING if mask is None else Context(mask=mask)

    def arguments(self, context: Context) -> dict[str, Any]:
        return {} if context.mask is None else {"attention_mask": context.mask}


def _find_mask(mask: Any) -> Tensor | None:
    """Which token sees which, [B, 1, T, T]; None if each sees all. Where a compiler or a GPU would have to wait for the
    values to know that, the mask is taken as it is.

    transformers gives its layers a mask of nothing but True under torch.export, for flex attention, and under a
    compiler with a PyTorch that is older than its newest.
    """
    if hasattr(mask, "mask_mod"):  # a BlockMask
        from torch.nn.attention.flex_attention import create_mask

        B, H, T, keys = mask.shape
        mask = create_mask(mask.mask_mod, B, H, T, keys, mask.kv_indices.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise value_error("IdleBlock", "attention_mask", "None or a mask [B, 1, T, T] of pairs of tokens", mask)
    if type(mask) is Tensor and mask.is_cpu and not torch.compiler.is_compiling() and not transformed():
        nothing = mask.all() if mask.dtype == torch.bool else not mask.any()
        return None if nothing else mask
    return mask


def _block_mask(mask: Tensor) -> Any:
    """A boolean mask [B or 1, 1, n, n] as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    pairs = mask.squeeze(1)  # PyTorch 2.10 has no rule for an index that is a number among tensors

    def sees(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pairs[image, query, key]

    images, queries, keys = pairs.shape
    return create_block_mask(sees, images, None, queries, keys, device=mask.device)


def _part(layer: Any, name: str, watch: Watch) -> Any:
    """Raises AttributeError if there is none."""
    getattr(layer, name)
    return watch.value(layer, name)


def _kind(layer: Any) -> str:
    """Which of the supported layers this is; "" if none."""
    for name in _LAYERS:
        kind = find_kind(name)
        if kind is not None and isinstance(layer, kind):
            return name
    return ""


class TransformersViTs(Family):
    """The place is the list of layers."""

    name = "transformers ViT, DeiT or DINOv2"
    forms = (LayerForm(),)

    def find(self, model: nn.Module) -> list[Any]:
        def holds(module: nn.Module) -> bool:
            return isinstance(module, nn.ModuleList) and len(module) > 0 and bool(_kind(module[0]))

        return [place for known in places(model, "PreTrainedModel") for place in outermost(known, holds)]

    def blocks(self, place: Any) -> list[nn.Module]:
        return list(place)

    def num_prefix_tokens(self, place: Any) -> int:
        config = getattr(place[0].attention, "config", None)
        return _LAYERS[_kind(place[0])] + getattr(config, "num_register_tokens", 0)
