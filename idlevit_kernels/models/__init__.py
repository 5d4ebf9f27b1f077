"""From a dense model to an IdleViT and back."""

from .apply import apply_idle, idle_blocks, remove_idle

__all__ = ["apply_idle", "idle_blocks", "remove_idle"]
