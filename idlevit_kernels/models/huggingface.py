"""ViT, DeiT and DINOv2 (with and without registers) of the Hugging Face transformers library, alone or within a model.

An idle layer hands its modules to ``idle_block`` by the names of timm's block (``parts``). It stays an instance of the
layer class whose place it takes, because that is how transformers finds the layers whose outputs are ``hidden_states``
and those whose activations it recomputes; a class for each is made when it is needed, as transformers is optional.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any

from torch import Tensor, nn

from ..block import IdleBlock, take_over
from ..errors import value_error

NAME = "transformers ViT, DeiT or DINOv2"

# Class of a layer: where it is, and the prefix tokens of its model, registers apart.
_LAYERS = {
    "ViTLayer": ("transformers.models.vit.modeling_vit", 1),
    "DeiTLayer": ("transformers.models.deit.modeling_deit", 2),
    "Dinov2Layer": ("transformers.models.dinov2.modeling_dinov2", 1),
    "Dinov2WithRegistersLayer": ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers", 1),
}
# What transformers sets on a layer whose activations are to be recomputed.
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


def _kind(layer: Any) -> str:
    """Which of the supported layers this is; "" if none."""
    for name, (home, _) in _LAYERS.items():
        if home in sys.modules and isinstance(layer, getattr(sys.modules[home], name)):
            return name
    return ""


def _lists_of_layers(module: nn.Module) -> list[str]:
    children = module.named_children()
    return [name for name, child in children if isinstance(child, nn.ModuleList) and len(child) and _kind(child[0])]


def find(model: Any) -> nn.Module | None:
    """The module that holds the list of layers; None if there is none, or more than one."""
    home = sys.modules.get("transformers.modeling_utils")
    if home is None or not isinstance(model, home.PreTrainedModel):
        return None
    found = [module for module in model.modules() if _lists_of_layers(module)]
    return found[0] if len(found) == 1 else None


def blocks(model: Any) -> list[nn.Module]:
    (name,) = _lists_of_layers(model)
    return list(getattr(model, name))


def set_blocks(model: Any, blocks: list[nn.Module]) -> None:
    (name,) = _lists_of_layers(model)
    layers = nn.ModuleList(blocks)
    take_over(layers, getattr(model, name))
    setattr(model, name, layers)


def num_prefix_tokens(model: Any) -> int:
    _, count = _LAYERS[_kind(blocks(model)[0])]
    return count + getattr(model.config, "num_register_tokens", 0)


def default_scorer(model: Any) -> str:
    return "cls"


def reasons(model: Any) -> list[str]:
    """Why this model cannot idle; empty if it can."""
    found = dict.fromkeys(_unfit(layer) for layer in blocks(model) if not isinstance(layer, IdleBlock))
    return [f"its layers are {reason}" for reason in found if reason is not None]


def _unfit(layer: Any) -> str | None:
    name, kind = _kind(layer), type(layer)
    if not name:
        return f"{kind.__name__}, not one of {', '.join(_LAYERS)}"
    if kind.forward is not getattr(sys.modules[_LAYERS[name][0]], name).forward:
        return f"{kind.__name__}, whose forward is not that of {name}"
    if "output_attentions" in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__} that return tuples, as in transformers before 4.56"
    try:
        _Parts(layer)
    except AttributeError as error:
        return f"laid out as in no version of transformers that is known here: {error}"
    return None


_IDENTITY = nn.Identity()


class _Attention:
    """A transformers attention by the names of timm's: [B, n, C] -> [B, n, C]."""

    q_norm = k_norm = _IDENTITY

    def __init__(self, attention: Any):
        self._attention = attention
        if hasattr(attention, "q_proj"):
            self.num_heads, self.q_proj, self.k_proj = attention.num_attention_heads, attention.q_proj, attention.k_proj
        else:  # ViT and DeiT in 5.0, DINOv2 in 5.16
            inner = attention.attention
            self.num_heads, self.q_proj, self.k_proj = inner.num_attention_heads, inner.query, inner.key

    def __call__(self, x: Tensor) -> Tensor:
        out = self._attention(x)
        return out[0] if isinstance(out, tuple) else out


class _Parts:
    """The modules of a layer by the names of timm's block. A class, as torch.compile traces no SimpleNamespace."""

    def __init__(self, layer: Any):
        dinov2 = hasattr(layer, "norm1")
        old_vit = not hasattr(layer, "mlp")  # in 5.0; ``output`` adds the residual itself, so its modules are called
        drop = layer.drop_path if dinov2 else layer.output.dropout if old_vit else layer.dropout
        self.norm1 = layer.norm1 if dinov2 else layer.layernorm_before
        self.attn = _Attention(layer.attention)
        self.gamma_1 = layer.layer_scale1.lambda1 if dinov2 else None
        self.drop_path1 = None if old_vit else drop
        self.norm2 = layer.norm2 if dinov2 else layer.layernorm_after
        self.mlp = (lambda x: layer.output.dense(layer.intermediate(x))) if old_vit else layer.mlp
        self.gamma_2 = layer.layer_scale2.lambda1 if dinov2 else None
        self.drop_path2 = drop


class _IdleLayer(IdleBlock):
    """An ``IdleBlock`` that is called as a transformers layer is."""

    def __init__(self, block: nn.Module, keep_ratio: float, num_prefix_tokens: int = 1, scorer: str = "auto"):
        super().__init__(block, keep_ratio, num_prefix_tokens, scorer)
        _carry_checkpointing(block, self)

    @staticmethod
    def check(block: nn.Module) -> None:
        reason = _unfit(block)
        if reason is not None:
            raise TypeError(f"IdleBlock: block must be a layer that transformers made, got {reason}")

    def parts(self) -> _Parts:
        return _Parts(self)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        inplace: bool = False,
        cut: str | None = None,
        rope: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``kwargs`` are what a transformers model hands down to all of its layers."""
        attention: Any = self.attention
        config = attention.config if hasattr(attention, "config") else attention.attention.config
        if kwargs.get("output_attentions", config.output_attentions):
            expected = "False, or the model dense (remove_idle): what idle tokens attend to does not exist"
            raise value_error("IdleBlock", "output_attentions", expected, True)
        return super().forward(x, attn_mask, is_causal, inplace, cut, rope)

    def dense_block(self) -> nn.Module:
        block = super().dense_block()
        _carry_checkpointing(self, block)
        return block


def _carry_checkpointing(source: nn.Module, target: nn.Module) -> None:
    for name in _CHECKPOINTING:
        if name in source.__dict__:
            setattr(target, name, source.__dict__[name])


def IDLE_BLOCK(block: nn.Module, keep_ratio: float, num_prefix_tokens: int, scorer: str) -> IdleBlock:
    return _idle_class(_kind(block))(block, keep_ratio, num_prefix_tokens, scorer)


@functools.cache
def _idle_class(name: str) -> type[IdleBlock]:
    layer = getattr(importlib.import_module(_LAYERS[name][0]), name)
    return type(f"Idle{name}", (_IdleLayer, layer), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """IdleViTLayer and the like, where pickle looks for them."""
    if name.startswith("Idle") and name.removeprefix("Idle") in _LAYERS:
        return _idle_class(name.removeprefix("Idle"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
