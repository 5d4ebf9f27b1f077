"""Each private name is used where it is there; without it, the public way gives the same results."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idlevit_kernels import versions

# The gates, loaded alone: what a release without a private name would make of them.
_SCRIPT = """
import importlib.util, sys, torch
{removal}
spec = importlib.util.spec_from_file_location("versions", {path!r})
versions = importlib.util.module_from_spec(spec)
sys.modules["versions"] = versions
spec.loader.exec_module(versions)
print([g.name for g in versions._gates if not g.available])
{check}
"""


def _without(removal: str, check: str = "") -> subprocess.CompletedProcess[str]:
    script = _SCRIPT.format(removal=removal, path=versions.__file__, check=check)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)


def test_floors_are_those_of_pyproject() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    floors = dict(re.findall(r'"(\w+)>=([\d.]+)["; ]', text)) | {
        "Python": text.partition('requires-python = ">=')[2][:4]
    }
    assert versions.FLOORS == {name: floors[name] for name in versions.FLOORS}


def test_versions_compare_as_numbers() -> None:
    assert versions._numbers("2.10.0+cu128") > versions._numbers("2.9.1") == (2, 9, 1)
    assert versions._numbers("2.15.0a0+git1") == (2, 15, 0) and versions._numbers("unknown") == ()


@pytest.mark.parametrize(
    "name, removal, check",
    [
        (
            "global module hooks",
            "del torch.nn.modules.module._has_any_global_hook",
            "assert versions.any_global_module_hook() is True",
        ),
        (
            "calls past the dispatcher",
            "del torch._C._dispatch_tls_local_include_set",
            "with torch.no_grad(): assert versions.ordinary_dispatch() is False",
        ),
        (
            "calls past the dispatcher",
            "del torch.autograd._profiler_enabled",
            "with torch.no_grad(): assert versions.ordinary_dispatch() is False",
        ),
        (
            "transforms of torch.func",
            "import torch._C._functorch as functorch\n"
            "import types\n"
            "left = {k: v for k, v in vars(functorch).items() if k != 'maybe_current_level'}\n"
            "sys.modules['torch._C._functorch'] = types.SimpleNamespace(**left)",
            "assert versions.functorch_active() is True",
        ),
        (
            "forward-mode differentiation",
            "import torch.autograd.forward_ad as ad\ndel ad._current_level",
            "assert versions.forward_ad_active() is True",
        ),
        (
            "hooks of a module",
            "def init(self):\n"
            "    object.__setattr__(self, '_hooks_of_the_future', {})\n"
            "torch.nn.Module.__init__ = init",
            "assert versions.has_hooks(None) is True and versions.HOOKS == versions.WATCHING_HOOKS == ()",
        ),
    ],
)
def test_without_a_private_name(name: str, removal: str, check: str) -> None:
    result = _without(removal, check)
    assert result.returncode == 0, result.stderr
    assert repr(name) in result.stdout
    assert result.stderr.count(f"a fast path is off: {name}: torch {torch.__version__} has no ") == 1


def test_the_report_is_of_this_machine() -> None:
    report = versions.report()
    assert len({gate.name for gate in report}) == len(report) >= 9
    assert all(gate.detail for gate in report)
    lost = [gate for gate in report if not gate.available and "has no" in gate.detail and "oneDNN" not in gate.detail]
    assert not lost  # no version that is supported lacks a name


def test_hooks_of_every_module_are_seen() -> None:
    assert not versions.any_global_module_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert versions.any_global_module_hook()
    finally:
        handle.remove()
    assert not versions.any_global_module_hook()


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_module_are_seen(register: str) -> None:
    module = nn.Linear(2, 2)
    assert not versions.has_hooks(module)
    handle = getattr(module, register)(lambda *args: None)
    assert versions.has_hooks(module)
    assert any(module.__dict__[name] for name in versions.WATCHING_HOOKS)
    handle.remove()
    assert not versions.has_hooks(module)


def test_every_hook_that_nn_module_keeps_is_known() -> None:
    kept = {name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward")) and "hook" in name}
    assert kept == set(versions.HOOKS)


def test_a_module_compiled_in_place_is_seen() -> None:
    module = nn.Linear(2, 2)
    assert not versions.compiled_in_place(module)
    module.compile(backend="eager")
    assert versions.compiled_in_place(module)


def _dispatch_mode() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize(
    "context",
    [
        _dispatch_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["dispatch mode", "autocast", "profiler"],
)
def test_the_dispatcher_has_work(context: Callable[[], Any]) -> None:
    with torch.no_grad():
        assert versions.ordinary_dispatch()
        with context():
            assert not versions.ordinary_dispatch()
        assert versions.ordinary_dispatch()
    with torch.inference_mode():
        assert versions.ordinary_dispatch()


def test_function_modes_are_seen() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        assert versions.ordinary_dispatch()
        with Mode():
            assert not versions.ordinary_dispatch()
        with torch.device("cpu"):  # a mode too: it gives new tensors their device
            assert not versions.ordinary_dispatch()
        assert versions.ordinary_dispatch()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vjp"])
def test_transforms_are_seen(transform: str) -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append((versions.functorch_active(), versions.forward_ad_active(), versions.ordinary_dispatch()))
        return x.square().sum()

    x = torch.randn(3)
    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(function)(x),
        "vmap": lambda: torch.func.vmap(function)(x[:, None]),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
        "vjp": lambda: torch.func.vjp(function, x),
    }
    assert not versions.functorch_active()
    calls[transform]()
    assert seen == [(True, transform == "jvp", False)]
    assert not versions.functorch_active()


def test_tangents_are_seen() -> None:
    x = torch.randn(3)
    assert not versions.forward_ad_active() and not versions.has_tangent(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert versions.forward_ad_active()
        assert versions.has_tangent(None, x, dual) and not versions.has_tangent(x, None)
    assert not versions.has_tangent(x)


@pytest.mark.parametrize(
    "state", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)], ids=["meta", "autocast"]
)
def test_what_onednn_can_does_not_depend_on_the_first_caller(state: Any) -> None:
    wanted = versions._onednn_reasons()
    versions._onednn_reasons.cache_clear()
    with state:
        assert versions._onednn_reasons() == wanted


def test_onednn_equals_pytorch() -> None:
    reasons = versions.onednn_reason(), versions.onednn_pack_reason()
    if any(reasons):
        pytest.skip(f"no oneDNN: {reasons}")
    x, weight, bias = torch.randn(3, 7, 40), torch.randn(24, 40), torch.randn(24)
    plain = F.linear(x, weight, bias)
    with torch.no_grad():
        for w in (weight, versions.onednn_pack(weight, 21)):
            torch.testing.assert_close(versions.onednn_linear(x, w, bias), plain)
            torch.testing.assert_close(versions.onednn_linear(x, w, None), plain - bias)
            for approximate in ("none", "tanh"):
                expected = F.gelu(plain, approximate=approximate)
                torch.testing.assert_close(versions.onednn_linear(x, w, bias, approximate), expected)
        packed = versions.onednn_pack(weight, 21)
        torch.testing.assert_close(versions.onednn_linear(x[:1, :2], packed, bias), plain[:1, :2])  # other rows too


def test_the_probe_leaves_the_random_numbers_alone() -> None:
    versions._onednn_reasons.cache_clear()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    versions.onednn_reason()
    assert torch.equal(torch.randn(4), expected)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    versions._onednn_reasons.cache_clear()
    try:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert versions.onednn_reason() == versions.onednn_pack_reason() == "this build of PyTorch has no oneDNN"
        assert not caplog.records  # a build without it has lost nothing
    finally:
        versions._onednn_reasons.cache_clear()


def test_without_the_ops_of_onednn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if versions.onednn_reason():
        pytest.skip(versions.onednn_reason())

    def gone(weight: torch.Tensor, rows: int) -> torch.Tensor:
        raise AttributeError("no attribute '_reorder_linear_weight'")

    versions._onednn_reasons.cache_clear()
    versions._log_lost.cache_clear()
    try:
        monkeypatch.setattr(versions, "_call_pack", gone)
        with caplog.at_level(logging.WARNING, "idlevit_kernels"):
            assert versions.onednn_reason() == ""
            assert "no attribute '_reorder_linear_weight'" in versions.onednn_pack_reason()
            assert versions.onednn_pack_reason() == versions.onednn_pack_reason()
        (record,) = caplog.records
        assert record.getMessage().startswith("a fast path is off: packed weights of oneDNN")
    finally:
        versions._onednn_reasons.cache_clear()


def test_flop_formulas_are_registered_once() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    op = torch.ops.aten.cumsum
    for _ in range(2):
        versions.count_flops(op, lambda x, *args, **kwargs: 7 * x.numel())
    with FlopCounterMode(display=False) as counter:
        torch.randn(5).cumsum(0)
    assert counter.get_total_flops() == 35


def test_the_attention_of_the_cpu_is_known() -> None:
    from torch.utils.flop_counter import flop_registry

    pairs = versions.attention_ops()
    assert len(pairs) == 2 and all(on_cuda in flop_registry for _, on_cuda in pairs)
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    called = {event.key for event in profile.key_averages()}
    assert {f"aten::{on_cpu.__name__}" for on_cpu, _ in pairs} <= called


def test_triton_compiler() -> None:
    pytest.importorskip("triton")
    found = versions.triton_compiler()
    assert callable(found.jit_function.run) and found.gpu_target("cuda", 80, 32).arch == 80
    assert Path(found.cuobjdump).exists()


def test_triton_laid_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    versions.triton_compiler.cache_clear()
    try:
        monkeypatch.delattr(triton, "knobs")
        with pytest.raises(ImportError, match=f"triton {triton.__version__} is laid out otherwise.*knobs"):
            versions.triton_compiler()
    finally:
        versions.triton_compiler.cache_clear()


def test_a_missing_cpp_compiler_is_told() -> None:
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert versions.missing_cpp_compiler() is not None


@pytest.mark.parametrize(
    "triton, numpy, works",
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.0", True), ("3.9.0", "3.0.0", True)],
)
def test_the_interpreter_of_triton_and_numpy(
    triton: str, numpy: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", {"triton": triton, "numpy": numpy}.get)
    reason = versions.triton_interpreter_reason()
    assert reason is None if works else reason is not None and f"triton {triton}" in reason


@pytest.fixture
def fresh_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_classes", {})
    versions._log_lost.cache_clear()


def test_a_class_that_moved_within_its_homes_is_found(fresh_classes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.layers
    from timm.models import vision_transformer

    kind = timm.layers.LayerScale
    monkeypatch.setattr(vision_transformer, "LayerScale", kind, raising=False)
    monkeypatch.delattr(timm.layers, "LayerScale")
    assert versions.library_class("LayerScale") is kind
    assert versions.is_exactly(kind(3), "Mlp", "LayerScale") and not versions.is_exactly(kind(3), "Mlp")
    assert not versions.is_exactly(type("Mine", (kind,), {})(3), "LayerScale")  # a subclass may compute something else


def test_a_class_that_is_gone_is_told_once(
    fresh_classes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import timm
    import timm.layers

    kind = timm.layers.DropPath
    monkeypatch.delattr(timm.layers, "DropPath")
    with caplog.at_level(logging.WARNING, "idlevit_kernels"):
        assert versions.library_class("DropPath") is versions.library_class("DropPath") is None
        assert not versions.is_exactly(kind(), "DropPath")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"a fast path is off: timm's DropPath: timm {timm.__version__} has none in timm.l"
    )
    gate = next(gate for gate in versions.report() if gate.name == "formulas of timm's modules")
    assert not gate.available and "DropPath" in gate.detail


def test_the_forwards_of_this_timm_are_known() -> None:
    versions.report()  # imports all of them
    for name in versions._READS:
        kind = versions.library_class(name)
        assert kind is not None and versions.changed_forward(kind, name) == ""


def test_a_forward_that_learnt_something_is_told_once(
    fresh_classes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from timm.layers import Attention

    attention = Attention(8, num_heads=2)
    assert versions.is_exactly(attention, "Attention")
    forward = Attention.forward

    def with_sinks(self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        heads = [self.sinks for _ in range(2)]  # within a comprehension, whose code is its own before Python 3.12
        return forward(self, x, attn_mask) + heads[0]

    with caplog.at_level(logging.WARNING, "idlevit_kernels"):
        monkeypatch.setattr(Attention, "forward", with_sinks)
        assert not versions.is_exactly(attention, "Attention") and not versions.is_exactly(attention, "Attention")
        (record,) = caplog.records
        assert record.getMessage().startswith("a fast path is off: timm's Attention: in timm ")
        assert "sinks" in record.getMessage()
        gate = next(gate for gate in versions.report() if gate.name == "formulas of timm's modules")
        assert not gate.available and "Attention" in gate.detail and "sinks" in gate.detail
    monkeypatch.undo()
    assert versions.is_exactly(attention, "Attention")


def test_a_library_that_is_not_loaded_is_not_imported(
    fresh_classes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: dict[str, ModuleType] = {k: v for k, v in sys.modules.items() if not k.startswith(("timm", "transformers"))}
    monkeypatch.setattr(sys, "modules", loaded)
    assert versions.library_class("Block") is None and versions.library_class("ViTLayer") is None
    assert not any(name.startswith(("timm", "transformers")) for name in loaded)
    assert not caplog.records


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    gate = next(gate for gate in versions.report() if gate.name == "layers of transformers")
    assert gate == ("layers of transformers", False, "transformers is not installed")
