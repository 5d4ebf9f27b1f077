"""IdleViT: Vision Transformers whose tokens idle instead of being dropped, with fused kernels (arXiv 2310.05654)."""

from . import versions
from .block import Context, IdleBlock, IdleOutput, idle_block
from .deploy.cuda_graph import CapturedModel, capture
from .deploy.pictures import visualize
from .errors import ArgumentError, BackendError
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
from .ops import functional
from .ops.backends import use_backend
from .ops.functional import *  # noqa: F403 (an op that is added there is public)
from .schedule import idle_schedule
from .train.losses import IdleViTLoss

__version__ = versions.PACKAGE

__all__ = [
    *functional.__all__,
    "ArgumentError",
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
    "count_macs",
    "idle_block",
    "idle_blocks",
    "idle_config",
    "idle_schedule",
    "load_released",
    "register_family",
    "remove_idle",
    "selections",
    "set_keep_ratio",
    "use_backend",
    "visualize",
]
