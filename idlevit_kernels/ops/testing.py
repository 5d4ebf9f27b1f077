"""Cases of the ops, and how results are compared: what tests and benchmarks share. Arguments and tolerances are those
of the ops' records.

A result is compared with the float64 reference on the same inputs. The error is the largest absolute difference over
max(1, largest expected magnitude), so one number serves scores of any size. Index outputs compare exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import functional, reference
from .cases import Case, Sample
from .record import RECORDS, Op

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

TOLERANCES = {(name, dtype): op.tolerance.limit(dtype) for name, op in RECORDS.items() for dtype in DTYPES}


def _spread(dtype: torch.dtype) -> list[Case]:
    return [
        Case(2, 196, 384, 137, dtype=dtype),
        Case(3, 49, 33, 7, P=2, dtype=dtype, layout="offset", scores="ties"),
        Case(2, 16, 40, 16, P=0, dtype=dtype, layout="transposed", scores="special"),  # K = N
        Case(1, 1, 8, 1, dtype=dtype),  # N = 1
        Case(0, 10, 8, 3, dtype=dtype),  # B = 0
        Case(2, 21, 3, 1, P=5, dtype=dtype, scores="equal"),  # three channels, K = 1, registers
        Case(1, 576, 1024, 100, dtype=dtype, layout="offset"),
    ]


# Small enough to run everywhere, odd enough to find tail, tie and stride errors.
CASES = [case for dtype in DTYPES for case in _spread(dtype)]
# Every token count that people use: 14x14 and 24x24 patches, DINOv2 at 518, SAM at 1024.
LARGE_CASES = [Case(1, n, 64, k) for n, k in ((576, 192), (1369, 958), (4096, 1404))]


def make_tokens(case: Case, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """x [B, T, C] in the case's layout."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    if case.layout == "offset":
        return random(case.B, case.T + 3, case.C + 5)[:, 2 : case.T + 2, 3 : case.C + 3]
    if case.layout == "transposed":
        return random(case.B, case.C, case.T).transpose(1, 2)
    return random(case.B, case.T, case.C)


def make_scores(case: Case, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """[B, T] scores with the case's difficulty."""
    scores = torch.randn(case.B, case.T, generator=generator, dtype=torch.float64)
    if case.scores == "ties":
        scores = (scores * 2).round()
    elif case.scores == "equal":
        scores = torch.zeros_like(scores)
    elif case.scores == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=torch.float64)
        scores = special[torch.randint(len(special), scores.shape, generator=generator)]
    return scores.to(device, torch.float64 if case.dtype == torch.float64 else torch.float32)


def make_arguments(op: str, case: Case, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
    """Positional arguments of the op of that name for the case, freshly drawn."""
    return arguments_of(RECORDS[op], case, seed, device)


def arguments_of(op: Op[..., Any], case: Case, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = make_tokens(case, generator, device)
    scores = make_scores(case, generator, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    weight, bias, gamma = 1 + 0.1 * random(case.C), 0.1 * random(case.C), random(case.C)
    indices = reference.select_tokens(scores, case.K, case.P)
    tokens, branch = random(case.B, case.n, case.C), random(case.B, case.n, case.C)
    sample = Sample(case, x, scores, (weight, bias, 1e-6), gamma, indices, tokens, branch, random)
    return op.arguments(sample)


OPS = tuple(sorted(RECORDS))
# Ops whose public function returns less than the op does: tests compare what the op returns.
_RAW = ("token_cut_loss",)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def expected(op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The float64 reference on the same inputs, moved to the CPU. In-place ops: the tensor they wrote to."""
    wide = [(a.double() if a.is_floating_point() else a).cpu() if isinstance(a, Tensor) else a for a in arguments]
    if op.endswith("_"):
        wide[0] = wide[0].clone()
        RECORDS[op](*wide)
        return [wide[0]]
    return list(_tensors(RECORDS[op](*wide)))


def run(op: str, arguments: tuple[Any, ...], backend: str) -> list[Tensor]:
    """The op on a backend through the public function (the raw op where it has none)."""
    function = (None if op in _RAW else getattr(functional, op, None)) or getattr(torch.ops.idlevit, op)
    result = function(*arguments, backend=backend)
    return [arguments[0]] if op.endswith("_") else list(_tensors(result))


def error(actual: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over max(1, largest expected magnitude); inf where only one of them is not finite."""
    if actual.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    actual, wanted = actual.detach().cpu().double(), wanted.detach().cpu().double()
    if not torch.equal(actual.isfinite(), wanted.isfinite()):
        return float("inf")
    wanted = wanted.nan_to_num(0, 0, 0)
    return float((actual.nan_to_num(0, 0, 0) - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def check(op: str, actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Raises AssertionError, with the op and the figures, unless every output is within the table's tolerance."""
    assert len(actual) == len(wanted), f"{op}: {len(actual)} outputs, expected {len(wanted)}"
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        if not w.is_floating_point():
            assert torch.equal(a.cpu(), w), f"{op}: output {i} differs in its indices"
        else:
            found, limit = error(a, w), TOLERANCES[op, dtype]
            assert found <= limit, f"{op}: output {i} has error {found:.2e}, more than {limit:.2e} ({dtype})"
