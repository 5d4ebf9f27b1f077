"""From a dense model to an IdleViT and back."""

from .apply import apply_idle, idle_blocks, idle_config, remove_idle, set_keep_ratio
from .family import Family, register_family
from .released import load_released
from .training import IdleViTForTraining

__all__ = [
    "Family",
    "IdleViTForTraining",
    "apply_idle",
    "idle_blocks",
    "idle_config",
    "load_released",
    "register_family",
    "remove_idle",
    "set_keep_ratio",
]
