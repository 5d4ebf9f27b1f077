"""Each op on every backend that can run, beside the plain PyTorch it replaces, on DeiT-S's shapes at keep ratio 0.7.

All forms of a group do the same work on the same tensors; each result is checked against the float64 reference before
it is timed. With ``-m full`` the reference under torch.compile is timed too, beside the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import idlevit_kernels as ik
from idlevit_kernels.block.latency import num_inputs, rotating
from idlevit_kernels.block.timing import Timing, alternated_samples
from idlevit_kernels.measure.info import backend_reasons
from idlevit_kernels.measure.machine import find_device
from idlevit_kernels.ops import backends, testing
from idlevit_kernels.ops.record import RECORDS

DEVICE = find_device("bench", None)
CASES = {batch: testing.Case(batch, 196, 384, 137) for batch in (1, 8, 32)}
SECONDS = 1.5  # for each group


def _rows(indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return indices.unsqueeze(-1).expand(-1, -1, x.shape[2])


def _gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.gather(1, _rows(indices, x))


def _scatter(x: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return x.scatter(1, _rows(indices, x), tokens)


def _expand(tokens: torch.Tensor, indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return _scatter(tokens.new_zeros(len(tokens), num_tokens, tokens.shape[2]), indices, tokens)


def _cls_direction(x: Any, w: Any, b: Any, eps: float, qkv_weight: Any, qkv_bias: Any) -> torch.Tensor:
    width = qkv_weight.shape[0] // 3
    query = F.linear(F.layer_norm(x[:, 0], x.shape[2:], w, b, eps), qkv_weight[:width], qkv_bias[:width])
    return query @ qkv_weight[width : 2 * width]


def _token_scores(x: Any, direction: Any, w: Any, b: Any, eps: float) -> torch.Tensor:
    return (F.layer_norm(x, x.shape[2:], w, b, eps) @ direction.unsqueeze(-1)).squeeze(-1)


def _select_tokens(scores: Any, num_keep: int, prefix: int) -> torch.Tensor:
    kept = scores[:, prefix:].topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values + prefix
    return torch.cat([torch.arange(prefix, device=scores.device).expand(len(scores), -1), kept], dim=1)


def _select_gather_norm(x: Any, scores: Any, num_keep: int, prefix: int, w: Any, b: Any, eps: float) -> Any:
    indices = _select_tokens(scores, num_keep, prefix)
    return indices, F.layer_norm(_gather(x, indices), x.shape[2:], w, b, eps)


def _gather_add_norm(x: Any, indices: Any, branch: Any, gamma: Any, scale: float, w: Any, b: Any, eps: float) -> Any:
    tokens = _gather(x, indices) + scale * gamma * branch
    return tokens, F.layer_norm(tokens, x.shape[2:], w, b, eps)


def _scatter_add_tokens(x: Any, indices: Any, tokens: Any, branch: Any, gamma: Any, scale: float) -> torch.Tensor:
    return _scatter(x, indices, tokens + scale * gamma * branch)


PLAIN: dict[str, Callable[..., Any]] = {
    "cls_direction": _cls_direction,
    "token_scores": _token_scores,
    "select_tokens": _select_tokens,
    "select_gather_norm": _select_gather_norm,
    "gather_tokens": _gather,
    "gather_add_norm": _gather_add_norm,
    "scatter_tokens": _scatter,
    "scatter_add_tokens": _scatter_add_tokens,
    "expand_tokens": _expand,
}


def forms(op: str) -> list[str]:
    arguments = testing.make_arguments(op, CASES[1], device=DEVICE.type)
    usable = [name for name, reasons in backend_reasons().items() if not reasons]
    return [*(name for name in usable if not backends.named(name).reasons(op, arguments)), "plain"]


def call(op: str, form: str) -> Callable[..., Any]:
    if form == "compiled reference":
        return torch.compile(RECORDS[op].reference, fullgraph=True, dynamic=False)
    return PLAIN[op] if form == "plain" else functools.partial(getattr(ik, op), backend=form)


@functools.cache
def comparison(op: str, batch: int, compiled: bool) -> dict[str, list[float]]:
    """Seconds per call, of each form, measured in alternation."""
    case = CASES[batch]
    sets = num_inputs(RECORDS[op].bytes_moved(case.sizes), DEVICE)  # of arguments, which each form goes round
    arguments = [testing.make_arguments(op, case, seed, DEVICE.type) for seed in range(sets)]
    calls = {form: call(op, form) for form in (*forms(op), *(["compiled reference"] if compiled else []))}
    wanted = testing.expected(op, arguments[0])
    for function in calls.values():
        result = function(*arguments[0])
        testing.check(op, [result] if isinstance(result, torch.Tensor) else list(result), wanted, case.dtype)
    rounds = {form: rotating(lambda given, f=function: f(*given), arguments) for form, function in calls.items()}
    return alternated_samples(rounds, SECONDS, device=DEVICE)


GROUPS = [(op, batch, compiled) for compiled in (False, True) for op in PLAIN for batch in CASES]


@pytest.mark.parametrize(
    ("op", "batch", "compiled", "form"),
    [
        pytest.param(op, batch, compiled, form, marks=pytest.mark.full if compiled else [])
        for op, batch, compiled in GROUPS
        for form in (*forms(op), *(["compiled reference"] if compiled else []))
    ],
)
def test_op(benchmark: Any, replay: Callable[..., Timing], op: str, batch: int, compiled: bool, form: str) -> None:
    benchmark.group = f"{op}, batch {batch:2d}{', beside torch.compile' if compiled else ''}"
    benchmark.name = form
    samples = comparison(op, batch, compiled)[form]
    moved = RECORDS[op].bytes_moved(CASES[batch].sizes)
    timing = replay(samples, DEVICE, bytes=moved)
    benchmark.extra_info["gb_per_s"] = moved / timing.median / 1e9
