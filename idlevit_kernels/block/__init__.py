"""The block layer: one formula (``chain``), what it is made of (``parts``, ``attention``, ``mlp``), who calls it."""

from .api import IdleBlock, IdleSequential, idle_block
from .chain import IdleOutput
from .context import Context

__all__ = ["Context", "IdleBlock", "IdleOutput", "IdleSequential", "idle_block"]
