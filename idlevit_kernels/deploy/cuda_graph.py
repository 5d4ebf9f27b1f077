"""A whole model as one CUDA graph: one launch a forward pass instead of one a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Words, describe, type_error, value_error
from ..versions import leave_pool, tree_map_only

_WARM_UP = 3  # passes: libraries make their handles and workspaces in the first, and Triton kernels are compiled


def capture(model: nn.Module, example: Tensor) -> CapturedModel:
    """Records the model's forward pass, in inference, as a CUDA graph for inputs like ``example``.

    At small batches a GPU is done with a kernel before the host has launched the next; a graph launches all at once.
    Equivalent PyTorch: ``model(x)`` under ``torch.no_grad()``, for the shape, dtype and device of the example only. An
    autocast context that is open during the call is recorded with it.

    ``torch.compile(model, mode="reduce-overhead")`` makes CUDA graphs too. It also fuses what lies between this
    package's kernels and makes another graph for every shape that comes; in return it compiles the model first, and
    its outputs are overwritten by the next call. ``capture`` records the kernels that eager mode launches.

    Args:
        model: in evaluation mode, all of it on one CUDA device. The graph reads its parameters where they lie: it sees
            weights that change in place (``load_state_dict``), and not what replaces a parameter or a module (``to``,
            ``remove_idle``): capture again after those.
        example: an input, on the model's device; its values do not matter.

    Returns:
        A callable that takes inputs of the example's shape, dtype and device and returns what the model returns, in
        tensors of its own. One call at a time: all of them share one input buffer.

    Raises:
        TypeError: model is not a module, or example not a tensor.
        ValueError: the model trains or is not on one CUDA device, or the example is elsewhere.
        RuntimeError: the model does what no graph can hold, such as reading a result on the host. The current stream,
            the allocator and the random number generators are then as they were before.
    """
    if not isinstance(model, nn.Module):
        raise type_error("capture", "model", "a torch.nn.Module", model)
    if not isinstance(example, Tensor):
        raise type_error("capture", "example", "one input tensor, such as images [B, 3, H, W]", example)
    for name, module in model.named_modules():
        if module.training:
            got = f"{type(module).__name__} {name!r} in training mode" if name else "one in training mode"
            raise value_error("capture", "model", "in evaluation mode; call model.eval()", Words(got))
    devices = {t.device for t in [*model.parameters(), *model.buffers()]} or {example.device}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        got = Words(f"one on {', '.join(sorted(map(str, devices)))}")
        raise value_error("capture", "model", "on one CUDA device (only those have graphs)", got)
    if example.device not in devices:
        raise value_error("capture", "example", f"on {next(iter(devices))}, where the model is", example)
    return CapturedModel(model, example)


class CapturedModel:
    """What ``capture`` returns. ``model`` is the model, kept alive because the graph reads its memory."""

    def __init__(self, model: nn.Module, example: Tensor):
        self.model = model
        with torch.cuda.device(example.device), _inference(), _autocast_without_cache():
            self._input = example.clone()
            self._graph = torch.cuda.CUDAGraph()
            with _side_stream() as stream:
                for _ in range(_WARM_UP):
                    model(self._input)
                try:
                    self._output = _record(self._graph, lambda: model(self._input), stream)
                except RuntimeError as error:
                    first = error.__context__ or error  # ending a capture that has failed fails as well
                    raise RuntimeError(
                        f"capture: {type(model).__name__} cannot be recorded as a CUDA graph: {first}\nIts forward pass"
                        " must not wait for the device: no .item(), no .cpu(), no branch on a tensor's value."
                    ) from error

    def __call__(self, x: Tensor) -> Any:
        check_like("capture", x, self._input)
        with torch.cuda.device(x.device), _inference():
            self._input.copy_(x)
            self._graph.replay()
            return copy_tensors(self._output)

    def __repr__(self) -> str:
        return f"CapturedModel({type(self.model).__name__}, {describe(self._input)})"


@contextlib.contextmanager
def _side_stream() -> Iterator[torch.cuda.Stream]:
    """A new stream that is current within the context, and that waits for the one before it and is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def _record(graph: torch.cuda.CUDAGraph, run: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    """What run() returns, its kernels recorded in the graph. ``stream`` is current.

    Ending a capture that has failed raises before PyTorch has taken back what the capture began (2.8 to 2.11): without
    the clean-up below, every later random number on the device raises.
    """
    pool = torch.cuda.graph_pool_handle()
    try:
        # "thread_local": another thread, one that loads data say, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            return run()
    except RuntimeError:
        _clean_up(pool, stream)
        raise


def _clean_up(pool: Any, stream: torch.cuda.Stream) -> None:
    """Takes the allocator and the random number generators out of a failed capture."""
    device = torch.cuda.current_device()
    leave_pool(device, pool)
    # A capture that succeeds leaves the generators as they should be, with their seeds and offsets; giving them another
    # state instead would part them from the graphs that were captured before.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=torch.device("cuda", device))


def check_like(op: str, x: Any, recorded: Tensor) -> None:
    """A tensor with the shape, dtype and device of the recorded input; the error names what differs."""
    if not isinstance(x, Tensor):
        raise type_error(op, "x", f"a tensor like the example, {describe(recorded)}", x)
    differs = [name for name in ("shape", "dtype", "device") if getattr(x, name) != getattr(recorded, name)]
    if differs:
        wanted = f"of the example's {' and '.join(differs)}: {describe(recorded)} (a graph holds one; capture another)"
        raise value_error(op, "x", wanted, x)


def copy_tensors(output: Any) -> Any:
    """The output, in whatever tuples, lists, dictionaries or registered classes it comes, with tensors of its own."""
    return tree_map_only(Tensor, torch.clone, output)


@contextlib.contextmanager
def _inference() -> Iterator[None]:
    """No gradients; ordinary tensors all the same, which a loss may save (a teacher's logits)."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _autocast_without_cache() -> torch.autocast:
    """The autocast that is on, if any, casting weights anew: a cached cast is freed while the graph still reads it."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
