"""Compiles the Triton kernels without a GPU. No kernel may spill registers or need a stack; what is not compiled must
have a reason. ``pytest -m full -s`` on this file prints the table of every shape, type and architecture."""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import pytest
import torch

pytest.importorskip("triton")

from idlevit_kernels.ops import backends, testing  # noqa: E402
from idlevit_kernels.ops.backends.triton import TRITON, compile_table, launch, type_reasons  # noqa: E402
from idlevit_kernels.ops.backends.triton.compile_table import ARCHITECTURES, SHAPES, TYPES  # noqa: E402
from idlevit_kernels.ops.record import RECORDS  # noqa: E402

DOUBLE = TYPES[-1]


# Each type and each architecture once, at the widest shape.
SOME = [(types, ARCHITECTURES[i % len(ARCHITECTURES)]) for i, types in enumerate(TYPES)]


@pytest.mark.slow
@pytest.mark.parametrize(("types", "architecture"), SOME, ids=lambda value: getattr(value, "name", f"sm_{value}"))
def test_no_kernel_spills(types: compile_table.Types, architecture: int) -> None:
    check(list(compile_table.table([architecture], [types], SHAPES[-1:])), types)


@pytest.mark.full
@pytest.mark.parametrize("types", TYPES, ids=lambda types: types.name)
def test_no_kernel_of_any_shape_and_architecture_spills(types: compile_table.Types) -> None:
    rows = list(compile_table.table(types=[types]))
    print()
    for line in compile_table.lines(rows):
        print(line)
    assert {row.architecture for row in rows} == set(ARCHITECTURES) == {80, 90, 100, 120}
    check(rows, types)


def check(rows: list[compile_table.Row], types: compile_table.Types) -> None:
    refused = {(row.launch.name, row.types) for row in rows if row.usage is None}
    assert refused == ({("token_cut_loss_backward", "float64")} if types == DOUBLE else set())
    for row in rows:
        if row.usage is None:
            assert row.reasons, row
        else:
            assert row.usage.stack == row.usage.local == 0, row
            assert row.usage.shared <= 99 * 1024, row


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_what_is_refused_does_not_compile(architecture: int) -> None:
    """In a process of its own: the compiler may end it."""
    found = compile_table.launches(SHAPES[0], DOUBLE)
    (index, *_) = (i for i, launch in enumerate(found) if launch.name == "token_cut_loss_backward")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(compile_table._compile, (SHAPES[0], DOUBLE, index, architecture)).exception()
    assert error is not None, "Triton compiles it by now: take the reason out of ops/backends/triton"


def test_float64_gradients_of_the_cut_loss_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a machine with a GPU: the backend says that it cannot, so that "auto" takes another."""
    assert (
        "Triton compiles its product of computed float64" in type_reasons("token_cut_loss_backward", [torch.float64])[0]
    )
    assert type_reasons("token_cut_loss", [torch.float64]) == []
    assert type_reasons("token_cut_loss_backward", [torch.float32]) == []
    arguments = testing.make_arguments("token_cut_loss_backward", testing.Case(1, 9, 8, 3, dtype=torch.float64))
    monkeypatch.setattr(TRITON, "installed", list)
    monkeypatch.setattr(TRITON, "device_types", None)
    monkeypatch.setitem(backends._PREFERENCE, "cpu", ("triton", "cpu", "reference"))
    assert backends.choose("token_cut_loss_backward", "auto", arguments) is backends.CPU
    assert backends.choose("token_cut_loss", "auto", arguments[1:]) is TRITON


def test_every_op_is_in_the_table() -> None:
    """scatter_add and expand share the kernels of scatter."""
    kernels = {launch.name for launch in compile_table.launches(SHAPES[0], TYPES[0])}
    shared = {"scatter_add_tokens": "scatter_tokens", "expand_tokens": "scatter_tokens"}
    for op in (op.name for op in RECORDS.values() if "triton" in op.kernels):
        name = op.removesuffix("_")
        name = shared.get(name, name) + ("_in_place" if op.endswith("_") else "")
        assert name in kernels


def test_one_configuration_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict[str, int]] = []
    only = {"BLOCK_M": 32}
    assert launch.tuned(("op",), (only,), ran.append, torch.device("cuda", 0)) is only and ran == []
