"""Each fused op beside the plain PyTorch sequence that it replaces, on the shapes of DeiT-S at keep ratio 0.7.

Both sides do the same work on the same tensors; the result is checked against the reference before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels import testing

CASES = {batch: testing.Case(batch, 196, 384, 137) for batch in (1, 8, 32)}


def _gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _cls_direction(x: Any, w: Any, b: Any, eps: float, qkv_weight: Any, qkv_bias: Any) -> torch.Tensor:
    width = qkv_weight.shape[0] // 3
    query = F.linear(F.layer_norm(x[:, 0], x.shape[2:], w, b, eps), qkv_weight[:width], qkv_bias[:width])
    return query @ qkv_weight[width : 2 * width]


def _token_scores(x: Any, direction: Any, w: Any, b: Any, eps: float) -> torch.Tensor:
    return (F.layer_norm(x, x.shape[2:], w, b, eps) @ direction.unsqueeze(-1)).squeeze(-1)


def _select_tokens(scores: Any, num_keep: int, prefix: int) -> torch.Tensor:
    kept = scores[:, prefix:].topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values + prefix
    return torch.cat([torch.arange(prefix).expand(len(scores), -1), kept], dim=1)


def _select_gather_norm(x: Any, scores: Any, num_keep: int, prefix: int, w: Any, b: Any, eps: float) -> Any:
    indices = _select_tokens(scores, num_keep, prefix)
    return indices, F.layer_norm(_gather(x, indices), x.shape[2:], w, b, eps)


def _gather_add_norm(x: Any, indices: Any, branch: Any, gamma: Any, scale: float, w: Any, b: Any, eps: float) -> Any:
    tokens = _gather(x, indices) + scale * gamma * branch
    return tokens, F.layer_norm(tokens, x.shape[2:], w, b, eps)


def _scatter_add_tokens(x: Any, indices: Any, tokens: Any, branch: Any, gamma: Any, scale: float) -> torch.Tensor:
    return x.scatter(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]), tokens + scale * gamma * branch)


PLAIN: dict[str, Callable[..., Any]] = {
    "cls_direction": _cls_direction,
    "token_scores": _token_scores,
    "select_tokens": _select_tokens,
    "select_gather_norm": _select_gather_norm,
    "gather_add_norm": _gather_add_norm,
    "scatter_add_tokens": _scatter_add_tokens,
}


@pytest.mark.parametrize("batch", CASES)
@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize("form", ["fused", "plain"])
def test_op(benchmark: Any, op: str, batch: int, form: str) -> None:
    case = CASES[batch]
    benchmark.group = f"{op}, batch {batch}"
    arguments = testing.make_arguments(op, case)
    call = getattr(ik, op) if form == "fused" else PLAIN[op]
    result = call(*arguments)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    testing.check(op, outputs, testing.expected(op, arguments), case.dtype)
    benchmark(call, *arguments)
