"""The PyTorch reference as a backend: runs every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..errors import value_error


def installed() -> list[str]:
    return []


def reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    return []


def check_indices(op: str, indices: Tensor, num_tokens: int) -> None:
    """On a GPU the check would wait for the device, so there it is left to PyTorch's own device-side assertion."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    if indices[:, 0].amin() < 0 or indices[:, -1].amax() >= num_tokens or (indices.diff(dim=1) <= 0).any():
        raise bad_indices(op, indices, num_tokens)


def bad_indices(op: str, indices: Tensor, num_tokens: int) -> ValueError:
    low, high = int(indices.amin()), int(indices.amax())
    return value_error(
        op,
        "indices",
        f"strictly ascending in each image and inside [0, {num_tokens}) (as select_tokens returns them)",
        f"values from {low} to {high}, "
        + ("ascending" if bool((indices.diff(dim=1) > 0).all()) else "not strictly ascending"),
    )


cls_direction = reference.cls_direction
token_scores = reference.token_scores
select_tokens = reference.select_tokens
select_gather_norm = reference.select_gather_norm
gather_norm_backward = reference.gather_norm_backward
token_cut_loss_backward = reference.token_cut_loss_backward


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    check_indices("gather_tokens", indices, x.shape[1])
    return reference.gather_tokens(x, indices)


def scatter_tokens(x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    check_indices("scatter_tokens", indices, x.shape[1])
    return reference.scatter_tokens(x, indices, tokens)


def scatter_tokens_(x: Tensor, indices: Tensor, tokens: Tensor) -> None:
    check_indices("scatter_tokens_", indices, x.shape[1])
    reference.scatter_tokens_(x, indices, tokens)


def expand_tokens(tokens: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    check_indices("expand_tokens", indices, num_tokens)
    return reference.expand_tokens(tokens, indices, num_tokens)


def gather_add_norm(x: Tensor, indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_indices("gather_add_norm", indices, x.shape[1])
    return reference.gather_add_norm(x, indices, *rest)


def scatter_add_tokens(x: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    check_indices("scatter_add_tokens", indices, x.shape[1])
    return reference.scatter_add_tokens(x, indices, *rest)


def scatter_add_tokens_(x: Tensor, indices: Tensor, *rest: Any) -> None:
    check_indices("scatter_add_tokens_", indices, x.shape[1])
    reference.scatter_add_tokens_(x, indices, *rest)


def token_cut_loss(q: Tensor, k: Tensor, indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_indices("token_cut_loss", indices, q.shape[1])
    return reference.token_cut_loss(q, k, indices, *rest)
