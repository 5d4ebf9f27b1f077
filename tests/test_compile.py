"""torch.compile with Inductor, torch.export and AOTInductor on whole idle models: the same logits as eager."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from small_models import tiny
from torch import Tensor, nn
from torch.export import Dim

import idlevit_kernels as ik

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
KINDS = [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True, "reg_tokens": 4}, {"init_values": 0.1}]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def idle(depth: int = 4, **kwargs) -> nn.Module:
    return ik.apply_idle(tiny(depth=depth, **kwargs), schedule=[1.0, *[0.5] * (depth - 1)])


def deit_small(**kwargs) -> nn.Module:
    return ik.apply_idle(timm.create_model("deit_small_patch16_224", **kwargs).eval(), keep_ratio=0.7)


def images(batch: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width)


def idle_ops(program: torch.export.ExportedProgram) -> set[str]:
    return {node.target._opname for node in program.graph.nodes if str(node.target).startswith("idlevit.")}


@pytest.mark.full
def test_deit_small_under_dynamic_compile() -> None:
    model = deit_small(dynamic_img_size=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 224, 224), (3, 224, 224), (2, 192, 256)):
        image = images(*shape)
        torch.testing.assert_close(compiled(image), model(image), **TOLERANCE)


@pytest.mark.parametrize(
    ("compiler", "kwargs"),
    [("aot_eager", KINDS[0]), ("aot_eager", KINDS[2])]  # traces all that Inductor is given, and takes seconds
    + [pytest.param("inductor", kwargs, marks=pytest.mark.full) for kwargs in KINDS],
    ids=str,
)
def test_dynamic_compile_of_other_kinds(compiler: str, kwargs: dict) -> None:
    model = idle(depth=2, dynamic_img_size=True, **kwargs)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((2, 64, 64), (3, 64, 64), (2, 96, 64)):
        image = images(*shape)
        torch.testing.assert_close(compiled(image), model(image), **TOLERANCE)


@pytest.mark.full
def test_gradients_under_dynamic_compile() -> None:
    model = idle(depth=2).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.enable_grad():
        for batch in (2, 3):
            image = images(batch)
            found, wanted = (
                torch.autograd.grad(m(image).square().sum(), list(model.parameters())) for m in (compiled, model)
            )
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_of_deit_small(dynamic: bool) -> None:
    model = deit_small()
    shapes = ({0: Dim("batch", min=1, max=1024)},) if dynamic else None
    program = torch.export.export(model, (images(2, 224, 224),), dynamic_shapes=shapes)
    assert idle_ops(program) == {
        "cls_direction", "token_scores", "select_gather_norm", "gather_add_norm", "scatter_add_tokens",
    }  # fmt: skip
    exported = program.module()
    for batch in (2, 1, 5) if dynamic else (2,):
        image = images(batch, 224, 224)
        torch.testing.assert_close(exported(image), model(image), **TOLERANCE)


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_export_of_other_kinds(kwargs: dict) -> None:
    model = idle(**kwargs)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    for batch in (1, 2, 7):
        image = images(batch)
        torch.testing.assert_close(program.module()(image), model(image), **TOLERANCE)


def test_export_with_dynamic_image_size() -> None:
    model = idle(dynamic_img_size=True)
    rows, columns = Dim("rows", min=2, max=16), Dim("columns", min=2, max=16)
    shapes = ({0: Dim("batch", min=1, max=64), 2: 16 * rows, 3: 16 * columns},)
    program = torch.export.export(model, (images(2, 64, 96),), dynamic_shapes=shapes)
    # Not 16 patches: there timm does not resize its position embedding, so dense models are another program, too.
    for shape in ((2, 64, 96), (1, 32, 96), (3, 128, 48)):
        image = images(*shape)
        torch.testing.assert_close(program.module()(image), model(image), **TOLERANCE)


def test_an_exported_program_is_saved_and_loaded(tmp_path: Path) -> None:
    model, image = idle(), images(2)
    program = torch.export.export(model, (image,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert idle_ops(loaded) == idle_ops(program) != set()
    torch.testing.assert_close(loaded.module()(image), model(image), **TOLERANCE)


def test_export_records_the_backend_asked_for() -> None:
    """ "auto" unless the program is exported under ``use_backend``: then it runs where that backend does."""
    model, image = idle(), images(2)

    def backends(program: torch.export.ExportedProgram) -> set[str]:
        return {n.kwargs.get("backend", "auto") for n in program.graph.nodes if str(n.target).startswith("idlevit.")}

    assert backends(torch.export.export(model, (image,))) == {"auto"}
    with ik.use_backend("reference"):
        program = torch.export.export(model, (image,))
    assert backends(program) == {"reference"}
    torch.testing.assert_close(program.module()(image), model(image), **TOLERANCE)


@pytest.mark.full
def test_aot_inductor_package(tmp_path: Path) -> None:
    """The package calls the ops through their registration, so idlevit_kernels must be imported where it is loaded."""
    model = idle(depth=2)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for batch in (2, 1, 5):
        image = images(batch)
        torch.testing.assert_close(packaged(image), model(image), **TOLERANCE)
