"""IdleViT: Vision Transformers whose tokens idle instead of being dropped, with fused kernels (arXiv 2310.05654)."""

from . import versions
from .block import Context, IdleBlock, IdleOutput, idle_block
from .deploy.cuda_graph import CapturedModel, capture
from .deploy.pictures import visualize
from .errors import BackendError
from .measure.macs import MacReport, count_macs
from .models import (
    Family,
    IdleViTForTraining,
    apply_idle,
    idle_blocks,
    idle_config,
    load_released,
    register_family,
    remove_idle,
    set_keep_ratio,
)
from .models.recording import selections
from .models.training import IdleViTOutput
from .ops.backends import use_backend
from .ops.functional import (
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
from .schedule import idle_schedule
from .train.losses import IdleViTLoss

__version__ = versions.PACKAGE

__all__ = [
    "BackendError",
    "CapturedModel",
    "Context",
    "Family",
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
    "register_family",
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
