"""Other ways to make a Vision Transformer faster at inference, written from their papers, to compare with IdleViT.

Each takes a timm VisionTransformer, whose weights it shares, and one number; each in the best form that PyTorch offers
today (scaled_dot_product_attention wherever the method does not need the attention map).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from idlevit_kernels import count_macs

from .dynamicvit import DynamicViT
from .evit import EViT
from .evovit import EvoViT
from .released import ReleasedIdleViT
from .tome import ToMe

__all__ = ["DynamicViT", "EViT", "EvoViT", "ReleasedIdleViT", "ToMe", "peers_of", "setting_for_macs"]


def peers_of(
    model: nn.Module, keep_ratio: float, macs: int, input_size: tuple[int, ...] | None = None
) -> dict[str, tuple[nn.Module, str]]:
    """The peers of an IdleViT: those that have its keep ratio, and those set to its multiply-accumulates.

    Args:
        model: the dense timm VisionTransformer, whose weights they share.
        keep_ratio, macs: of the IdleViT.
        input_size: as in ``count_macs``.

    Returns:
        By name, the peer and its setting in words.
    """
    on_meta = copy.deepcopy(model).to("meta")

    def at_equal_macs(peer: type, low: float, high: float) -> float:
        return setting_for_macs(lambda setting: peer(on_meta, setting), macs, low, high, input_size)

    keep_rate, ratio = at_equal_macs(EViT, 0.01, 1.0), at_equal_macs(DynamicViT, 0.05, 1.0)
    slow = at_equal_macs(EvoViT, 0.01, 1.0)
    r = ToMe(model, at_equal_macs(ToMe, 0.0, 2 * on_meta.patch_embed.num_patches / len(on_meta.blocks))).r
    return {
        "released order": (ReleasedIdleViT(model, keep_ratio), f"keep ratio {keep_ratio:g}"),
        "EViT": (EViT(model, keep_ratio), f"keep rate {keep_ratio:g}"),
        "EViT, equal MACs": (EViT(model, keep_rate), f"keep rate {keep_rate:.3f}"),
        "ToMe, equal MACs": (ToMe(model, r), f"{r:.2f} tokens merge in a layer"),
        "DynamicViT, equal MACs": (DynamicViT(model, ratio), f"keep ratio {ratio:.3f}"),
        "Evo-ViT, equal MACs": (EvoViT(model, slow), f"keep ratio {slow:.3f}"),
    }


def setting_for_macs(
    make: Callable[[float], nn.Module], macs: int, low: float, high: float, input_size: tuple[int, ...] | None = None
) -> float:
    """The number between ``low`` and ``high`` at which ``make(number)`` has ``macs``, as nearly as there is one.

    Args:
        make: a peer for a number; its multiply-accumulates must rise, or fall, with the number all the way.
        macs: of one image.
        low, high: where to look.
        input_size: as in ``count_macs``.
    """

    tried: dict[float, int] = {}

    def excess(setting: float) -> int:
        tried[setting] = count_macs(make(setting), input_size).total - macs
        return tried[setting]

    below, above = sorted((low, high), key=excess)
    for _ in range(8):
        if min(map(abs, tried.values())) <= macs / 500 or not tried[below] < 0 < tried[above]:
            break
        # Nearly a straight line, in steps of a token; the line between the ends, kept off them, meets zero soon.
        share = min(max(-tried[below] / (tried[above] - tried[below]), 0.1), 0.9)
        setting = below + share * (above - below)
        below, above = (setting, above) if excess(setting) < 0 else (below, setting)
    return min(tried, key=lambda setting: abs(tried[setting]))
