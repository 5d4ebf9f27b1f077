"""Exported files give the logits of the model in the runtime that they are for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import timm
import torch
import torch._inductor.config
from torch import nn
from typer.testing import CliRunner

import idlevit_kernels as ik
from idlevit_kernels.cli import app
from idlevit_kernels.deploy.export import _translations, export_model, largest_difference, load_exported
from idlevit_kernels.models import lvvit  # noqa: F401  registers its names with timm

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 64, 64)
SMALL = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 10}


def tiny(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    """Weights large enough that no two tokens score alike; not a parameter is 0 or 1."""
    model = timm.create_model(name, **SMALL | options).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.2 if p.dim() == 1 else 0.05)
    return ik.apply_idle(model, schedule=[1.0, *[0.5] * (len(model.blocks) - 1)])


KINDS = {
    "class token": {},
    "mean score, LayerScale": {"class_token": False, "global_pool": "avg", "init_values": 0.1},
    "norms on q and k, registers": {"qk_norm": True, "reg_tokens": 4},
    "no bias": {"qkv_bias": False, "dynamic_img_size": True},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if i < 2 else pytest.mark.full) for i, kind in enumerate(KINDS)],
)
def test_onnx_gives_the_logits_with_standard_operators(tmp_path: Path, kind: str) -> None:
    model = tiny(**KINDS[kind])
    path = export_model(model, tmp_path / "model.onnx", "onnx", SIZE)
    program = onnx.load(path)
    onnx.checker.check_model(program)
    assert {node.domain for node in program.graph.node} == {""} and not program.functions
    operators = [node.op_type for node in program.graph.node]
    assert operators.count("TopK") == operators.count("ScatterND") == 2
    assert largest_difference(model, load_exported(path), SIZE) <= 1e-4  # at three batch sizes


@pytest.mark.full
def test_onnx_of_lvvit(tmp_path: Path) -> None:
    model = timm.create_model("lvvit_tiny_patch16_224", img_size=64).eval()
    ik.apply_idle(model, 0.5)
    path = export_model(model, tmp_path / "model.onnx", "onnx", SIZE)
    assert largest_difference(model, load_exported(path), SIZE) <= 1e-4


def test_every_forward_op_has_its_standard_operators() -> None:
    """What a model may call at inference; the in-place ops are functionalised before."""
    written = {op._opname for op in _translations()}
    assert written == {
        "cls_direction", "token_scores", "select_tokens", "select_gather_norm", "gather_tokens", "gather_add_norm",
        "scatter_tokens", "scatter_add_tokens",
    }  # fmt: skip


def test_torch_export_keeps_the_ops(tmp_path: Path) -> None:
    model = tiny()
    path = export_model(model, tmp_path / "model.pt2", "torch-export", SIZE)
    names = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert {"idlevit.token_scores.default", "idlevit.select_gather_norm.default"} <= names
    assert largest_difference(model, load_exported(path, "torch-export"), SIZE) <= 1e-4


@pytest.mark.full
def test_aot_inductor(tmp_path: Path) -> None:
    model = tiny()
    path = export_model(model, tmp_path / "model.pt2", "aoti", SIZE)
    assert largest_difference(model, load_exported(path, "aoti"), SIZE) <= 1e-4


def run(*arguments: str, code: int = 0):
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["export", *arguments])
    assert result.exit_code == code, result.output
    return result


MODEL = ["--model", "test_vit", "--image-size", "32"]  # six layers of 64 channels


def test_the_command_checks_and_times_what_it_wrote(tmp_path: Path) -> None:
    path, weights, schedule = (tmp_path / name for name in ("model.pt2", "weights.pt", "schedule.json"))
    model = timm.create_model("test_vit", img_size=32).eval()
    torch.save(model.state_dict(), weights)
    ratios = [1.0] * 4 + [0.5, 0.25]
    schedule.write_text(f'{{"schedule": {ratios}}}')
    options = ["--weights", str(weights), "--schedule", str(schedule), "--format", "torch-export"]
    text = run(str(path), *MODEL, *options, "--seconds", "0.1", "--batch", "2").stdout
    for expected in (str(path), "logits as in PyTorch", "batch 2", "dense", "idle", "MAC bound"):
        assert expected in text.replace("\n", "")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = ik.apply_idle(model, schedule=ratios)(image)
        torch.testing.assert_close(load_exported(path, "torch-export")(image), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.onnx", "--format", "tflite"], "onnx, torch-export, aoti"),
        (["model.pt2"], "ends in .onnx"),
        (["model.onnx", "--format", "aoti"], "ends in .pt2"),
        (["missing/model.onnx"], "missing"),
        (["model.onnx", "--batch", "0"], "at least 1"),
        (["model.onnx", "--seconds", "-1"], "at least 0"),
        (["model.onnx", "--keep-ratio", "2"], "(0, 1]"),
        (["model.onnx", "--weights", "missing.pt"], "missing.pt"),
        (["model.onnx", "--weights", "missing.pt", "--pretrained"], "left out"),
        (["model.onnx", "--schedule", "missing.json"], "missing.json"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(options: list[str], expected: str) -> None:
    (line,) = run(*options, *MODEL, code=2).stderr.splitlines()
    assert line.startswith("idlevit: ") and expected in line


def test_errors_name_what_a_format_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with pytest.raises(TypeError, match="export: model must be a torch.nn.Module"):
        export_model("model", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="eval mode"):
        export_model(model.train(), tmp_path / "model.onnx", input_size=SIZE)
    with pytest.raises(ValueError, match="float32 for onnx"):
        export_model(model.eval().bfloat16(), tmp_path / "model.onnx", input_size=SIZE)
    with pytest.raises(ValueError, match="onnx has no standard operators for .*half_tokens"):
        export_model(_WithAnOpOfItsOwn(model.float()).eval(), tmp_path / "model.onnx", input_size=SIZE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxscript, onnxruntime: pip install 'idlevit-kernels\[exp"):
        export_model(model, tmp_path / "model.onnx", input_size=SIZE)
    monkeypatch.undo()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(RuntimeError, match="format aoti needs a C.. compiler"):
        export_model(model, tmp_path / "model.pt2", "aoti", SIZE)
    assert not list(tmp_path.iterdir())


@torch.library.custom_op("idlevit_test::half_tokens", mutates_args=())
def half_tokens(x: torch.Tensor) -> torch.Tensor:
    return x / 2


half_tokens.register_fake(torch.empty_like)


class _WithAnOpOfItsOwn(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return half_tokens(self.model(images))
