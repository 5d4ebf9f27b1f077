from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from small_models import SMALL, tiny
from torch.utils.flop_counter import FlopCounterMode

import idlevit_kernels as ik

# GMACs at 224 x 224: dense, then keep ratios 0.9 to 0.5 (convolutions, linear layers, the two products of attention).
TABLE = {
    "deit_small_patch16_224": (4.599, 3.916, 3.351, 2.881, 2.476, 2.149),
    "deit_base_patch16_224": (17.564, 15.015, 12.876, 11.075, 9.511, 8.243),
}


@pytest.fixture
def on_meta():
    """Models whose weights take no memory: counting needs shapes only."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str, on_meta: None) -> None:
    model = timm.create_model(name)
    for ratio, wanted in zip((None, 0.9, 0.8, 0.7, 0.6, 0.5), TABLE[name], strict=True):
        if ratio is not None:
            ik.apply_idle(model, keep_ratio=ratio)
        assert ik.count_macs(model).total / 1e9 == pytest.approx(wanted, rel=5e-3)
        if ratio is not None:
            ik.remove_idle(model)


def counted(model: torch.nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_agrees_with_torch_on_a_real_pass(kwargs: dict, ratio: float, grad: bool) -> None:
    model = ik.apply_idle(tiny(**kwargs), keep_ratio=ratio)
    with torch.set_grad_enabled(grad):
        flops = counted(model, torch.randn(1, 3, 64, 64))
    assert ik.count_macs(model, (3, 64, 64)).total == pytest.approx(flops / 2, rel=5e-3)


def test_a_counter_made_before_the_first_pass_misses_nothing() -> None:
    script = (
        "import timm, torch, idlevit_kernels as ik\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "model = ik.apply_idle(timm.create_model('vit_small_patch16_224', depth=2).eval(), schedule=[0.5, 0.5])\n"
        "with torch.no_grad(), FlopCounterMode(display=False) as counter:\n"
        "    model(torch.randn(1, 3, 224, 224))\n"
        "print(counter.get_total_flops(), ik.count_macs(model).total)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    flops, macs = map(int, result.stdout.split())
    assert macs == pytest.approx(flops / 2, rel=5e-3)


def test_direction_saves_the_keys_of_idle_tokens() -> None:
    """Against the released form, which computes queries and keys of every token in an idle layer."""
    model = tiny()
    dense = ik.count_macs(model, (3, 64, 64))
    ik.apply_idle(model, schedule=[1.0, 1.0, 1.0, 0.5])
    idle = ik.count_macs(model, (3, 64, 64))
    C, T, n = SMALL["embed_dim"], 17, 9
    linear = n * 12 * C * C + 2 * C * C  # the block's linear layers, and two products for the direction
    attention = 2 * n * n * C
    assert idle.per_layer["blocks.3"] == pytest.approx(linear + attention + T * C, abs=T * C)
    assert idle.total - idle.per_layer["blocks.3"] == dense.total - dense.per_layer["blocks.3"]


def test_layers_add_up_and_stand_in_order() -> None:
    report = ik.count_macs(ik.apply_idle(tiny(), keep_ratio=0.5), (3, 64, 64))
    assert list(report.per_layer) == ["patch_embed", *(f"blocks.{i}" for i in range(4)), "head"]
    assert sum(report.per_layer.values()) == report.total
    blocks = [report.per_layer[f"blocks.{i}"] for i in range(4)]
    assert blocks == sorted(blocks, reverse=True) and len(set(blocks)) == 4


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_unchanged(training: bool) -> None:
    model = ik.apply_idle(tiny(drop_path_rate=0.1), keep_ratio=0.5).train(training)
    model.blocks[2].eval()
    calls: list[str] = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("hook"))
    modes = [m.training for m in model.modules()]
    state = {name: (value, value.clone(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    rng = torch.get_rng_state()
    before = ik.count_macs(model, (3, 64, 64))
    assert ik.count_macs(model, (3, 64, 64)) == before
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict(keep_vars=True).items():
        old, copy, version = state[name]
        assert value is old and value.device.type == "cpu" and value._version == version and torch.equal(value, copy)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.training or model(torch.randn(1, 3, 64, 64)).requires_grad
    assert calls == ["hook"] * training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    wanted = ik.count_macs(model, (3, 64, 64))
    assert ik.count_macs(model.to(dtype), (3, 64, 64)) == wanted


def test_a_named_backend_does_not_matter() -> None:
    model = ik.apply_idle(tiny(), keep_ratio=0.5)
    wanted = ik.count_macs(model, (3, 64, 64))
    for backend in ("cpu", "reference"):
        with ik.use_backend(backend):
            assert ik.count_macs(model, (3, 64, 64)) == wanted


@pytest.mark.parametrize("size", [(224, 224), (3, 224), (3, 0, 224), (3, -1, 2), (3.0, 64, 64), ("3", 64, 64)])
def test_bad_input_size(size: tuple) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^count_macs: input_size must be \(channels, height, width\)"):
        ik.count_macs(tiny(), size)


def test_bad_model() -> None:
    with pytest.raises(TypeError, match="^count_macs: model must be"):
        ik.count_macs("deit_small_patch16_224")
