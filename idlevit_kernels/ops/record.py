"""One record an op: the reference, and beside it all that is said of the op and not computed by a kernel.

A file of ``reference`` reads

    @op(kernels={"cpu"}, tolerance=Tolerance(...), arguments=lambda s: (s.x, ...), bytes_moved=lambda s: ...)
    def my_op(x: Tensor, ...) -> Tensor:  # the specification, in plain PyTorch; its annotations are the op's schema

    @my_op.fake
    def _(x, ...): ...  # what it returns, without computing it

and, if it has a gradient, ``@my_op.setup_context`` and ``@my_op.backward`` as in ``torch.library.register_autograd``.
``library`` defines each record's op. What a record lacks, tests/test_records.py names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Set
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from .cases import Sample, Sizes

P = ParamSpec("P")
R = TypeVar("R")

Shape = tuple[int, ...] | None
"""Of a tensor; None in the place of any other argument."""

# Unit roundoff of the stored type: half a unit in the last place, relative.
_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What accumulating a row costs: so many roundoffs of the accumulate type.
_ROW = 32


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far from the float64 reference an op's outputs may be, by what makes the difference; zero where bits move.

    Attributes:
        rows: sums over a row or a column, one after another.
        stored: roundings to the type of the tokens.
    """

    rows: float = 0
    stored: float = 0

    def limit(self, dtype: torch.dtype) -> float:
        """Of the largest absolute difference over max(1, largest expected magnitude)."""
        accumulated = _ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        return self.rows * _ROW * accumulated + self.stored * _ROUNDOFF[dtype]


class Op(Generic[P, R]):
    """An op. Calling it computes its reference; ``call`` takes the same arguments and ``backend``, and dispatches.

    Attributes:
        name: of the op, its reference, its kernels and its public function. One that ends in "_" writes to its first
            argument and returns nothing.
        reference: the specification.
        call: the op as ``library`` has defined it.
        kernels: the backends that have a kernel for it.
        composed: the backends that run it as a composition of other kernels or of PyTorch's operators, because that is
            what it is best made of. A backend in neither refuses the op.
        derivative_of: the op whose backward this one is. It has no public function and no derivative of its own.
        differentiable: whether the op has a gradient.
        tolerance, arguments, bytes_moved, macs: see ``op``.
    """

    call: Callable[..., R]

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        kernels: Set[str],
        composed: Set[str],
        derivative_of: str | None,
        differentiable: bool,
        tolerance: Tolerance,
        arguments: Callable[[Sample], tuple[Any, ...]],
        bytes_moved: Callable[[Sizes], int],
        macs: Callable[..., int] | None,
    ):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.kernels, self.composed = frozenset(kernels), frozenset(composed)
        self.derivative_of, self.differentiable = derivative_of, differentiable
        self.tolerance, self.arguments, self.bytes_moved, self.macs = tolerance, arguments, bytes_moved, macs
        self.fake_function: Callable[..., R] | None = None
        self.setup_function: Callable[..., None] | None = None
        self.backward_function: Callable[..., object] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.reference(*args, **kwargs)

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")

    @property
    def schema(self) -> str:
        """``(arguments) -> result``, from the reference's annotations, with a keyword-only ``backend``."""
        first = next(iter(inspect.signature(self.reference).parameters))
        inferred = torch.library.infer_schema(self.reference, mutates_args=(first,) if self.in_place else ())
        arguments, result = inferred.rsplit(") ->", 1)
        return f"{arguments}, *, str backend='auto') ->{result}"

    def fake(self, function: Callable[..., R]) -> Callable[..., R]:
        """What the op returns for such arguments, made without looking at their elements."""
        self.fake_function = function
        return function

    def setup_context(self, function: Callable[..., None]) -> Callable[..., None]:
        """``(ctx, inputs, output)``: keeps what the backward needs. ``ctx.backend`` is there already."""
        self.setup_function = function
        return function

    def backward(self, function: Callable[..., object]) -> Callable[..., object]:
        """``(ctx, *grads)``: a gradient or None for each argument, in a tuple if there are several.

        Indices are constants: selection has no gradient. A backward that is made of the ``call`` of differentiable ops
        alone can be differentiated again.
        """
        self.backward_function = function
        return function


RECORDS: dict[str, Op[..., Any]] = {}
"""Every op by its name: for those that walk over all of them, and for a backward that calls an op of a file which
imports its own."""


def op(
    *,
    kernels: Set[str] = frozenset(),
    composed: Set[str] = frozenset(),
    derivative_of: str | None = None,
    differentiable: bool = False,
    tolerance: Tolerance,
    arguments: Callable[[Sample], tuple[Any, ...]],
    bytes_moved: Callable[[Sizes], int],
    macs: Callable[..., int] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declares the op whose reference follows.

    Args:
        kernels, composed, derivative_of, differentiable: see ``Op``.
        tolerance: of its outputs; indices compare exactly.
        arguments: of the op for what was drawn for a case; tests and benchmarks are generated from it.
        bytes_moved: that the op must read and write, each value once; idle tokens only where they are needed.
        macs: multiply-accumulates of its matrix products, from the shapes of its arguments; None if it has none.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        record = Op(
            reference,
            kernels=kernels,
            composed=composed,
            derivative_of=derivative_of,
            differentiable=differentiable,
            tolerance=tolerance,
            arguments=arguments,
            bytes_moved=bytes_moved,
            macs=macs,
        )
        RECORDS[record.name] = record
        return record

    return declare
