"""The records of the ops: each is complete, and one that is not has its gaps named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import op_parts
import pytest
import torch
from torch import Tensor

from idlevit_kernels.ops import library, testing
from idlevit_kernels.ops.backends import CPU
from idlevit_kernels.ops.record import RECORDS, Op, Tolerance, op
from idlevit_kernels.ops.testing import DTYPES, OPS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_complete(name: str) -> None:
    found = op_parts.missing(RECORDS[name], ROOT)
    assert not found, "\n".join(found)


@pytest.fixture
def declare() -> Iterator[Any]:
    """Declares ops of this test alone, and does not define them."""
    before = dict(RECORDS)
    yield op
    RECORDS.clear()
    RECORDS.update(before)


def bare(declare: Any, **parts: Any) -> Op[..., Any]:
    @declare(**{"tolerance": Tolerance(), "arguments": lambda s: (s.x,), "bytes_moved": lambda s: s.image} | parts)
    def bare_op(x: Tensor) -> Tensor:
        return x

    return bare_op


def test_what_is_missing_is_named(declare: Any) -> None:
    record = bare(declare, kernels={"cpu", "triton"}, differentiable=True)
    found = op_parts.missing(record, ROOT)
    assert found[:4] == [
        "idlevit_kernels/ops/reference/test_records.py: no @bare_op.fake",
        "idlevit_kernels/ops/reference/test_records.py: no @bare_op.setup_context, and it is declared differentiable",
        "idlevit_kernels/ops/reference/test_records.py: no @bare_op.backward, and it is declared differentiable",
        "idlevit_kernels/ops/functional.py: no function bare_op",
    ]
    assert "idlevit_kernels/ops/backends/cpu.py or native.py: nothing that runs bare_op on cpu" in found
    if op_parts.TRITON:
        assert "idlevit_kernels/ops/backends/triton/__init__.py: nothing that runs bare_op on triton" in found


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"kernels": {"gpu"}}, "must name cpu, cuda and triton"),
        ({"kernels": {"cpu"}, "composed": {"cpu"}}, "must name cpu, cuda and triton, each at most once"),
        ({"arguments": lambda s: (s.x, s.scores)}, "arguments of bare_op must be as many as its parameters"),
        ({"bytes_moved": lambda s: 0}, "bytes_moved of bare_op must be positive"),
        ({"derivative_of": "no_such_op"}, "no op no_such_op"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(declare: Any, parts: dict[str, Any], message: str) -> None:
    (found,) = (m for m in op_parts._of_the_record(bare(declare, **parts)) if not m.endswith(".fake"))
    assert message in found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


@pytest.mark.parametrize(
    "file, gone, message",
    [
        ("csrc/tokens.h", "(*gather_tokens)", "csrc/tokens.h: no declaration of gather_tokens in namespace cpu"),
        ("csrc/tokens.h", "* gather_tokens(", "csrc/tokens.h: no declaration of gather_tokens in namespace cuda"),
        ("csrc/cpu/gather.h", " gather_tokens(", "csrc/cpu/: no definition of gather_tokens"),
        ("csrc/cuda/gather.cu", " gather_tokens(", "csrc/cuda/: no definition of gather_tokens"),
        ("csrc/cpu/kernels.cpp", "::gather_tokens", "csrc/cpu/kernels.cpp: gather_tokens is not in the table"),
        ("csrc/binding.cpp", '"cpu_gather_tokens"', "csrc/binding.cpp: cpu_gather_tokens is not bound"),
        ("csrc/binding.cpp", '"cuda_gather_tokens"', "csrc/binding.cpp: cuda_gather_tokens is not bound"),
    ],
)
def test_a_kernel_without_its_source_is_named(checkout: Path, file: str, gone: str, message: str) -> None:
    text = (checkout / file).read_text()
    assert gone in text
    (checkout / file).write_text(text.replace(gone, gone.replace("gather_tokens", "else")))
    assert op_parts.missing(RECORDS["gather_tokens"], checkout) == [message]


def test_a_composition_is_no_kernel(declare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bare(declare, kernels={"cpu"})
    monkeypatch.setattr(type(CPU), "bare_op", lambda self, x: x.clone(), raising=False)
    (found,) = op_parts._of_the_kernels(record, ROOT)
    assert found.endswith("bare_op calls no kernel; it is a composition")
    record = bare(declare)
    (found,) = op_parts._of_the_kernels(record, ROOT)
    assert found.endswith("bare_op runs on cpu, and its record does not say so")


def test_schemas() -> None:
    """Exported programs hold them: a change needs a new name."""
    schemas = {str(getattr(torch.ops.idlevit, name).default._schema).removeprefix("idlevit::") for name in OPS}
    assert {
        "gather_tokens(Tensor x, Tensor indices, *, str backend=\"auto\") -> Tensor",
        "scatter_tokens_(Tensor(a0!) x, Tensor indices, Tensor tokens, *, str backend=\"auto\") -> ()",
        "select_gather_norm(Tensor x, Tensor scores, SymInt num_keep, SymInt num_prefix_tokens, Tensor? norm_weight, "
        "Tensor? norm_bias, float eps, *, str backend=\"auto\") -> (Tensor, Tensor)",
    } <= schemas  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerances_grow_with_what_is_rounded(dtype: torch.dtype) -> None:
    assert Tolerance().limit(dtype) == 0
    roundoff = torch.finfo(dtype).eps / 2
    assert Tolerance(stored=1).limit(dtype) == roundoff
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    assert Tolerance(rows=2, stored=1).limit(dtype) == 64 * accumulated + roundoff


def test_the_direct_call_and_the_dispatched_one_agree() -> None:
    """``call`` goes past the dispatcher where nothing would happen there."""
    case = testing.Case(2, 9, 6, 4)
    for name in OPS:
        with torch.no_grad():
            arguments = testing.make_arguments(name, case)
            assert library.direct(*arguments)
            again = testing.make_arguments(name, case)
            found = RECORDS[name].call(*arguments)
            wanted = getattr(torch.ops.idlevit, name)(*again)
        if RECORDS[name].in_place:
            found, wanted = arguments[0], again[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
