"""A model as a file for another runtime: ONNX with standard operators only, torch.export, AOTInductor.

torch.export and AOTInductor keep this package's ops, so their kernels run there too, and the package must be imported
where the file is loaded. ONNX has no such ops: each is written out below in the standard operators that do its work
(TopK, GatherND, ScatterND, LayerNormalization, MatMul).

Of equal scores, ONNX's TopK takes the lower index, as the ops do; where it puts NaN is left to the runtime. The compact
buffer holds tokens in the order of TopK, not of the image: attention and MLP do not depend on it.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import versions
from ..errors import ArgumentValueError, type_error, value_error

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}

_MAX_BATCH = 65536
_OPSET = 20
_OVERLOAD = type(torch.ops.aten.add.Tensor)  # the class of every op in an exported graph


def export_model(
    model: nn.Module, path: str | os.PathLike[str], format: str = "onnx", input_size: tuple[int, ...] = (3, 224, 224)
) -> Path:
    """Writes the model to a file that takes images [B, *input_size] of any batch size and returns logits.

    Args:
        model: dense or idle, in eval mode. ONNX: float32. AOTInductor compiles for the device that the model is on.
        path: ends in ".onnx", or in ".pt2" for the other two.
        format: "onnx", "torch-export" or "aoti". A program of the latter two runs each op on the backend that the model
            would take: "auto", unless exported within ``use_backend``.
        input_size: (channels, height, width); the file takes no other.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a model that the format cannot hold.
        FileNotFoundError: the folder is not there.
        ModuleNotFoundError, RuntimeError: what the format needs is not installed; the message says what.
    """
    op, path = "export", Path(path)
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "a torch.nn.Module", model)
    if format not in SUFFIXES:
        raise value_error(op, "format", f"one of {', '.join(SUFFIXES)}", format)
    if path.suffix != SUFFIXES[format]:
        raise value_error(op, "path", f"a file that ends in {SUFFIXES[format]} for {format}", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in a folder that exists, got {path}")
    if model.training:
        raise value_error(op, "model", "in eval mode (call .eval())", "one in training mode")
    images = _example(model, input_size)
    if format == "onnx":
        _check_onnx(images.dtype)
    if format == "aoti":
        _check_compiler()
    # Two inputs of one batch size that is neither 0 nor 1, which torch.export would take for constants.
    shapes = ({0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        if format == "onnx":
            _save_onnx(program, path)
        elif format == "torch-export":
            torch.export.save(program, path)
        else:
            versions.aoti_compile(program, path)
    return path


def load_exported(
    path: str | os.PathLike[str], format: str = "onnx", threads: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The file as a function from images to logits, on the runtime that it is for.

    Args:
        path, format: as in ``export_model``.
        threads: of onnxruntime; by default as many as PyTorch takes. The others run on PyTorch's own.
    """
    if format == "torch-export":
        return torch.export.load(path).module()
    if format == "aoti":
        return versions.aoti_load(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def largest_difference(
    model: nn.Module, exported: Callable[[Tensor], Tensor], input_size: tuple[int, ...] = (3, 224, 224)
) -> float:
    """Between the logits of the file and of the model, over max(1, largest logit), at batch sizes 1, 2 and 5."""
    found = 0.0
    with torch.no_grad():
        for batch in (1, 2, 5):
            images = _example(model, input_size, batch)
            wanted = model(images)
            found = max(found, float((exported(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1)))
    return found


def _example(model: nn.Module, input_size: tuple[int, ...], batch: int = 2) -> Tensor:
    like = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    return torch.randn((batch, *input_size), device=like.device, dtype=like.dtype)


def _check_onnx(dtype: torch.dtype) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"export: format onnx needs {', '.join(missing)}: pip install 'idlevit-kernels[export]'"
        )
    if dtype is not torch.float32:
        raise value_error(
            "export", "model", "float32 for onnx (its tools convert the file to half precision afterwards)", dtype
        )


def _check_compiler() -> None:
    missing = versions.missing_cpp_compiler()
    if missing is not None:
        raise RuntimeError(
            f"export: format aoti needs a C++ compiler (g++; CXX names another), and there is none here: {missing}"
        )


def _save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    translations = _translations()
    ops = {node.target for node in program.graph.nodes if isinstance(node.target, _OVERLOAD)}
    foreign = sorted(str(op) for op in ops if op.namespace not in ("aten", "prims") and op not in translations)
    if foreign:
        calls = ", ".join(foreign)
        raise ArgumentValueError(f"export: onnx has no standard operators for {calls}, which the model calls")
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            custom_translation_table=translations,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = str(cause).partition("\n")[0]
        raise ArgumentValueError(f"export: torch.onnx cannot write the model: {reason}") from error
    assert written is not None
    written.save(path)


def _translations() -> dict[Any, Any]:
    """What each op is in ONNX. ``x`` and the like are values of the graph that is being written."""
    import onnxscript

    op: Any = onnxscript.opset20

    def norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        if weight is None:
            weight = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(x, start=-1))
        normed, _, _ = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)
        return normed

    def rows(indices: Any) -> Any:
        return op.Unsqueeze(indices, [-1])

    def add_branch(tokens: Any, branch: Any, gamma: Any, scale: float) -> Any:
        branch = branch if gamma is None else op.Mul(branch, gamma)
        return op.Add(tokens, branch if scale == 1 else op.Mul(branch, op.Constant(value_float=scale)))

    def cls_direction(
        x: Any, norm_weight: Any, norm_bias: Any, eps: float, qkv_weight: Any, qkv_bias: Any, backend: str = "auto"
    ) -> Any:
        width = qkv_weight.shape[0] // 3
        token = op.Gather(norm(x, norm_weight, norm_bias, eps), [0], axis=1)  # [B, 1, C]
        query = op.MatMul(token, op.Transpose(op.Slice(qkv_weight, [0], [width], [0]), perm=[1, 0]))
        if qkv_bias is not None:
            query = op.Add(query, op.Slice(qkv_bias, [0], [width], [0]))
        return op.Squeeze(op.MatMul(query, op.Slice(qkv_weight, [width], [2 * width], [0])), [1])

    def token_scores(
        x: Any, direction: Any, norm_weight: Any, norm_bias: Any, eps: float, backend: str = "auto"
    ) -> Any:
        return op.Squeeze(op.MatMul(norm(x, norm_weight, norm_bias, eps), op.Unsqueeze(direction, [-1])), [-1])

    def select_tokens(scores: Any, num_keep: int, num_prefix_tokens: int, backend: str = "auto") -> Any:
        image = op.Slice(scores, [num_prefix_tokens], [2**31 - 1], [1]) if num_prefix_tokens else scores
        _, kept = op.TopK(image, [num_keep], axis=1, sorted=0)
        if not num_prefix_tokens:
            return kept
        shape = op.Concat(op.Shape(scores, end=1), op.Constant(value_ints=[num_prefix_tokens]), axis=0)
        prefix = op.Expand(op.Constant(value_ints=list(range(num_prefix_tokens))), shape)
        return op.Concat(prefix, op.Add(kept, num_prefix_tokens), axis=1)

    def gather_tokens(x: Any, indices: Any, backend: str = "auto") -> Any:
        return op.GatherND(x, rows(indices), batch_dims=1)

    def select_gather_norm(
        x: Any,
        scores: Any,
        num_keep: int,
        num_prefix_tokens: int,
        norm_weight: Any,
        norm_bias: Any,
        eps: float,
        backend: str = "auto",
    ) -> Any:
        indices = select_tokens(scores, num_keep, num_prefix_tokens)
        # The norm of all tokens is there already, from their scores: a runtime sees that the two are one.
        return indices, gather_tokens(norm(x, norm_weight, norm_bias, eps), indices)

    def gather_add_norm(
        x: Any,
        indices: Any,
        branch: Any,
        gamma: Any,
        scale: float,
        norm_weight: Any,
        norm_bias: Any,
        eps: float,
        backend: str = "auto",
    ) -> Any:
        tokens = add_branch(gather_tokens(x, indices), branch, gamma, scale)
        return tokens, norm(tokens, norm_weight, norm_bias, eps)

    def scatter_tokens(x: Any, indices: Any, tokens: Any, backend: str = "auto") -> Any:
        images = op.Range(0, op.Squeeze(op.Shape(x, end=1), [0]), 1)
        images = op.Expand(op.Unsqueeze(images, [-1]), op.Shape(indices))  # [B, n], each image's number
        return op.ScatterND(x, op.Concat(rows(images), rows(indices), axis=-1), tokens)

    def scatter_add_tokens(
        x: Any, indices: Any, tokens: Any, branch: Any, gamma: Any, scale: float, backend: str = "auto"
    ) -> Any:
        return scatter_tokens(x, indices, add_branch(tokens, branch, gamma, scale))

    functions = (
        cls_direction,
        token_scores,
        select_tokens,
        select_gather_norm,
        gather_tokens,
        gather_add_norm,
        scatter_tokens,
        scatter_add_tokens,
    )
    return {getattr(torch.ops.idlevit, function.__name__).default: function for function in functions}
