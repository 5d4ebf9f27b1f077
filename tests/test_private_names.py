"""Private names of torch, timm, transformers and Triton stand in one file, idlevit_kernels/versions.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from idlevit_kernels import versions

PACKAGE = Path(versions.__file__).parent
LIBRARIES = ("torch", "timm", "transformers", "triton", "torchvision")
# What nn.Module keeps about its hooks and its compilation, whatever the variable that holds the module is called. Not
# _modules, _parameters and _buffers: they are as old as nn.Module, and nothing public shows a part that has two names.
OF_A_MODULE = {*versions.HOOKS, "_compiled_call_impl"}


def private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def dotted_name(node: ast.expr) -> str | None:
    """ "torch.ops.aten" of the expression that says so; None for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = dotted_name(node.value)
        return front and f"{front}.{node.attr}"
    return None


def private_names(source: str) -> Iterator[str]:
    """Those that a file uses: imported, reached by dots from a library or a name imported from it, or of a module."""
    tree = ast.parse(source)
    libraries = set(LIBRARIES)  # names in this file that are a library, or come from one
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for full, local in names:
            if full.partition(".")[0] in LIBRARIES:
                libraries.add(local)
                if private(full):
                    yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):  # aten = torch.ops.aten
            value = dotted_name(node.value)
            if value is not None and value.partition(".")[0] in libraries:
                libraries |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted_name(node)
            if name is not None and private(node.attr) and name.partition(".")[0] in libraries:
                yield name
            elif node.attr in OF_A_MODULE:
                yield f"nn.Module.{node.attr}"
        elif isinstance(node, ast.Constant) and node.value in OF_A_MODULE:
            yield f"nn.Module.{node.value}"
        elif isinstance(node, ast.Call) and dotted_name(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            holder, name = dotted_name(node.args[0]), _start_of_string(node.args[1])
            if holder is not None and holder.partition(".")[0] in libraries and private(name):
                yield f"{holder}.{name}"


def _start_of_string(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]  # type: ignore[assignment]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", sorted({*FILES} - {"versions.py"}))
def test_no_private_name_outside_the_gates(file: str) -> None:
    found = sorted(set(private_names((PACKAGE / file).read_text())))
    assert not found, f"{file} uses private names; give each a gate in versions.py"


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torch\ntorch._C._cuda_getCurrentRawStream(0)", {"torch._C", "torch._C._cuda_getCurrentRawStream"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch.nn.modules.module import _has_any_global_hook", {"torch.nn.modules.module._has_any_global_hook"}),
        ("from torch.utils import _pytree as pytree", {"torch.utils._pytree"}),
        ("import torch as t\nt.ops.mkldnn._linear_pointwise(x)", {"t.ops.mkldnn._linear_pointwise"}),
        ("import torch\naten = torch.ops.aten\naten._softmax(x)", {"aten._softmax"}),
        ("import torch\nhasattr(torch.ops.mkldnn, '_linear_pointwise')", {"torch.ops.mkldnn._linear_pointwise"}),
        ("import torch\ngetattr(torch.ops.aten, f'_attention{x}')", {"torch.ops.aten._attention"}),
        ("def f(part):\n    return part._forward_hooks", {"nn.Module._forward_hooks"}),
        ("NAMES = ['_backward_pre_hooks']", {"nn.Module._backward_pre_hooks"}),
        ("import timm.layers\ntimm.layers._fx.f()", {"timm.layers._fx"}),
        ("import torch\nself._plan.torch\ntorch.nn.Module.__init__(self)", set()),
        ("from ._own import _helper\n_helper._part", set()),
    ],
)
def test_what_the_search_finds(source: str, found: set[str]) -> None:
    assert set(private_names(source)) == found
