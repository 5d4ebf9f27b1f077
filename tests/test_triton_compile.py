"""Compiles every Triton kernel for every architecture, without a GPU: ``pytest -s tests/test_triton_compile.py``
prints the table. No kernel may spill registers or need a stack."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from idlevit_kernels import testing  # noqa: E402
from idlevit_kernels.backends.triton import compile_table  # noqa: E402


@pytest.mark.slow
def test_no_kernel_spills() -> None:
    rows = list(compile_table.table())
    print()
    for line in compile_table.lines(rows):
        print(line)
    assert {usage.architecture for _, _, usage in rows} == {80, 90, 100, 120}
    for model, launch, usage in rows:
        assert usage.stack == usage.local == 0, (model, launch, usage)
        assert usage.shared <= 99 * 1024, (model, launch, usage)


def test_every_op_is_in_the_table() -> None:
    """scatter_add and expand share the kernels of scatter."""
    kernels = {launch.name for launch in compile_table.launches(compile_table.SHAPES[0])}
    shared = {"scatter_add_tokens": "scatter_tokens", "expand_tokens": "scatter_tokens"}
    for op in set(testing.OPS) - {"cls_direction"}:  # PyTorch's products and no kernel of its own
        name = op.removesuffix("_")
        name = shared.get(name, name) + ("_in_place" if op.endswith("_") else "")
        assert name in kernels
