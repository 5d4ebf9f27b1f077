"""The specification: every op in plain PyTorch, any device, any float type. Read these first; they are never tuned."""

from .cls_direction import cls_direction
from .expand_tokens import expand_tokens
from .gather_add_norm import gather_add_norm
from .gather_norm_backward import gather_norm_backward
from .gather_tokens import gather_tokens
from .scatter_add_tokens import scatter_add_tokens, scatter_add_tokens_
from .scatter_tokens import scatter_tokens, scatter_tokens_
from .select_gather_norm import select_gather_norm
from .select_tokens import select_tokens
from .token_cut_loss import token_cut_loss, token_cut_loss_backward
from .token_scores import token_scores

__all__ = [
    "cls_direction",
    "expand_tokens",
    "gather_add_norm",
    "gather_norm_backward",
    "gather_tokens",
    "scatter_add_tokens",
    "scatter_add_tokens_",
    "scatter_tokens",
    "scatter_tokens_",
    "select_gather_norm",
    "select_tokens",
    "token_cut_loss",
    "token_cut_loss_backward",
    "token_scores",
]
