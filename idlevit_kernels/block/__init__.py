"""The block layer: one formula (``chain``), what it is made of (``parts``, ``attention``, ``mlp``), who calls it."""

from .api import IdleBlock, IdleSequential, idle_block
from .attention import CalledAttention
from .chain import IdleOutput
from .context import Context
from .mlp import find_mlp
from .parts import Attention, Form, Parts, Watch, find_branch, find_linear, find_norm

__all__ = [
    "Attention",
    "CalledAttention",
    "Context",
    "Form",
    "IdleBlock",
    "IdleOutput",
    "IdleSequential",
    "Parts",
    "Watch",
    "find_branch",
    "find_linear",
    "find_mlp",
    "find_norm",
    "idle_block",
]
