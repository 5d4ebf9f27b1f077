"""The formula stands once, and the way through it is short."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block

import idlevit_kernels as ik
from idlevit_kernels.backends import cpu

PACKAGE = Path(ik.__file__).parent
FUSED = {
    "cls_select_gather_norm", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_",
    "token_scores", "cls_direction",
}  # fmt: skip
# Where ops are defined, checked and run; everything else that calls one computes with it.
OPS = ("ops.py", "functional.py", "testing.py", "roofline.py", "complexity.py", "reference", "backends")


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_only_the_chain_calls_the_fused_ops() -> None:
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in OPS and FUSED & set(calls(path))
    }
    assert callers == {"block/chain.py"}
    assert FUSED <= set(calls(PACKAGE / "block" / "chain.py"))


# From the caller down; a call from a file to one above it is a step back up.
LAYERS = ["block/api.py", "block/chain.py", "ops.py", "backends/cpu.py", "backends/native.py"]


@pytest.mark.skipif(cpu.extension() is None, reason="the native extension is not built")
@torch.no_grad()
def test_the_way_from_a_block_to_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most six files, at most four steps back up, over all kernels of a block."""
    block, x = Block(48, 3).eval(), torch.randn(1, 17, 48)
    ik.idle_block(x, block, 7)  # looks up what is looked up once
    stacks: list[list[str]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "").startswith("cpu_"):
            stack = []
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if PACKAGE in path.parents:
                    stack.append(path.relative_to(PACKAGE).as_posix())
                frame = frame.f_back  # type: ignore[assignment]
            stacks.append(stack[::-1])

    sys.setprofile(profile)
    try:
        ik.idle_block(x, block, 7)
    finally:
        sys.setprofile(None)
    assert len(stacks) == 3  # select with gather and norm, add with norm, scatter
    files = {file for stack in stacks for file in stack}
    assert len(files) <= 6 and files <= set(LAYERS), files
    up = sum(
        LAYERS.index(b) < LAYERS.index(a) for stack in stacks for a, b in zip(stack, stack[1:], strict=False) if a != b
    )
    assert up <= 4, stacks
