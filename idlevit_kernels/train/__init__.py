"""Finetuning an IdleViT: the recipe, the data, a loop that survives, and the commands (`idlevit train`, `eval`)."""

from .engine import Options, Trainer
from .recipe import Recipe

__all__ = ["Options", "Recipe", "Trainer"]
