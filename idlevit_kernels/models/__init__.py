"""From a dense model to an IdleViT and back."""

from .apply import apply_idle, idle_blocks, remove_idle
from .checkpoint import load_released
from .training import IdleViTForTraining

__all__ = ["IdleViTForTraining", "apply_idle", "idle_blocks", "load_released", "remove_idle"]
