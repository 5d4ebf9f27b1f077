"""IdleViT: Vision Transformers whose tokens idle instead of being dropped, with fused kernels (arXiv 2310.05654)."""

from importlib.metadata import PackageNotFoundError, version

from .backends import use_backend
from .block import Context, IdleBlock, IdleOutput, idle_block
from .capture import CapturedModel, capture
from .complexity import MacReport, count_macs
from .errors import BackendError
from .functional import (
    cls_direction,
    expand_tokens,
    gather_add_norm,
    gather_tokens,
    scatter_add_tokens,
    scatter_add_tokens_,
    scatter_tokens,
    scatter_tokens_,
    select_gather_norm,
    select_tokens,
    token_cut_loss,
    token_scores,
)
from .losses import IdleViTLoss, IdleViTOutput
from .models import (
    IdleViTForTraining,
    apply_idle,
    idle_blocks,
    idle_config,
    load_released,
    remove_idle,
    set_keep_ratio,
)
from .schedule import idle_schedule
from .visualize import selections, visualize

try:
    __version__ = version("idlevit-kernels")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "CapturedModel",
    "Context",
    "IdleBlock",
    "IdleOutput",
    "IdleViTForTraining",
    "IdleViTLoss",
    "IdleViTOutput",
    "MacReport",
    "apply_idle",
    "capture",
    "cls_direction",
    "count_macs",
    "expand_tokens",
    "gather_add_norm",
    "gather_tokens",
    "idle_block",
    "idle_blocks",
    "idle_config",
    "idle_schedule",
    "load_released",
    "remove_idle",
    "scatter_add_tokens",
    "scatter_add_tokens_",
    "scatter_tokens",
    "scatter_tokens_",
    "select_gather_norm",
    "select_tokens",
    "selections",
    "set_keep_ratio",
    "token_cut_loss",
    "token_scores",
    "use_backend",
    "visualize",
]
