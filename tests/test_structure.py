"""Where things stand: layers (beside what `lint-imports` checks), names, one formula, a short way through it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block

import idlevit_kernels as ik
from idlevit_kernels.ops.backends import cpu

PACKAGE = Path(ik.__file__).parent
FUSED = {
    "cls_select_gather_norm", "select_gather_norm", "gather_add_norm", "scatter_add_tokens", "scatter_add_tokens_",
    "token_scores", "cls_direction",
}  # fmt: skip
# Where ops are defined, checked and run; everything else that calls one computes with it.
OPS = ("ops/", "measure/roofline.py")


def test_the_root_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_no_public_name_is_that_of_a_module_of_the_root() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert not modules & set(ik.__all__)


def past_the_layers(source: str) -> Iterator[str]:
    """What loads a module so that `lint-imports` does not see it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in ("importlib", "runpy", "imp", "pkgutil"))
        elif isinstance(node, ast.ImportFrom) and node.module in ("importlib", "runpy", "imp", "pkgutil", "sys"):
            yield from (f"{node.module}.{a.name}" for a in node.names if (node.module, a.name) != ("importlib", "util"))
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval"):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in LOADERS:
            yield node.attr
    yield from (match[0] for match in re.finditer(r"\bsys\.modules\b(?!\.get\()", source))


LOADERS = {"import_module", "spec_from_file_location", "spec_from_loader", "module_from_spec", "exec_module"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_stand_where_the_layers_are_checked(path: Path) -> None:
    """versions.py alone looks up, and for its report loads, modules of other libraries."""
    source = path.read_text()
    if path == PACKAGE / "versions.py":
        assert "idlevit_kernels." not in re.sub(r'"idlevit_kernels\.models\.lvvit"', "", source)
    else:
        assert not list(past_the_layers(source))


@pytest.mark.parametrize(
    "source, found",
    [
        ("import importlib\nimportlib.import_module('x')", {"importlib", "import_module"}),
        ("from importlib import import_module", {"importlib.import_module"}),
        ("import importlib.util\nimportlib.util.module_from_spec(s)", {"module_from_spec"}),
        ("from sys import modules", {"sys.modules"}),
        ("sys.modules['idlevit_kernels.train']", {"sys.modules"}),
        ("__import__('x')", {"__import__"}),
        ("sys.modules.get('timm.layers')", set()),
        ("import importlib.util\nimportlib.util.find_spec('onnx')", set()),
        ("model.eval()", set()),
    ],
)
def test_what_that_search_finds(source: str, found: set[str]) -> None:
    assert set(past_the_layers(source)) == found


def test_an_argument_that_does_not_fit_raises_argument_error() -> None:
    """The command line shows the traceback of any other TypeError or ValueError: it is a defect."""
    bare = re.compile(r"raise (?:TypeError|ValueError)\b")
    assert not [str(path) for path in PACKAGE.rglob("*.py") if bare.search(path.read_text())]


def test_no_test_imports_another() -> None:
    tests = Path(__file__).parent
    imports = re.compile(r"^\s*(?:from|import) (test_\w+)", re.M)
    assert not {
        f"{path.name}: {name}"
        for path in tests.rglob("*.py")
        for name in imports.findall(path.read_text())
        if (tests / f"{name}.py").exists()
    }


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_only_the_chain_calls_the_fused_ops() -> None:
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not path.relative_to(PACKAGE).as_posix().startswith(OPS) and FUSED & set(calls(path))
    }
    assert callers == {"block/chain.py"}
    assert FUSED <= set(calls(PACKAGE / "block" / "chain.py"))


# From the caller down; a call from a file to one above it is a step back up.
LAYERS = ["block/api.py", "block/chain.py", "ops/library.py", "ops/backends/cpu.py", "ops/backends/native.py"]


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
