"""Which backend runs a call, and what is said when none can."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from timm.models.vision_transformer import Block

import idlevit_kernels as ik
from idlevit_kernels.ops import backends
from idlevit_kernels.ops.backends import BACKENDS, CPU, REFERENCE, Backend, cpu

NO_GPU = not torch.cuda.is_available()
X = torch.randn(2, 5, 8)
INDICES = torch.tensor([[0, 2], [0, 4]])


def gather(**kwargs) -> torch.Tensor:
    return ik.gather_tokens(X, INDICES, **kwargs)


def gather_of(x: torch.Tensor) -> torch.Tensor:
    return ik.gather_tokens(x, INDICES)


def spy_on(monkeypatch: pytest.MonkeyPatch, backend: Backend, op: str, names: list[str]) -> None:
    """The backend's kernel for the op notes the backend's name, and runs."""
    kernel = backend.kernel
    run = kernel(op)

    def spy(*args):
        names.append(backend.name)
        return run(*args)

    monkeypatch.setattr(backend, "kernel", lambda name: spy if name == op else kernel(name))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that gather_tokens ran on, in order; they still run."""
    names: list[str] = []
    for backend in (CPU, REFERENCE):
        spy_on(monkeypatch, backend, "gather_tokens", names)
    return names


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend from the environment, and no choice remembered from an earlier call."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_fused", {})
    with ik.use_backend("auto"):
        yield


def test_auto_runs_the_native_kernels(ran: list[str]) -> None:
    gather()
    assert ran == ["cpu"]


def test_use_backend_nests_and_restores(ran: list[str]) -> None:
    with ik.use_backend("reference"):
        gather()
        with ik.use_backend("cpu"):
            gather()
            with ik.use_backend("auto"):
                gather()
        gather()
    gather()
    assert ran == ["reference", "cpu", "cpu", "reference", "cpu"]


def test_use_backend_restores_after_an_error(ran: list[str]) -> None:
    with pytest.raises(KeyError), ik.use_backend("reference"):
        raise KeyError
    gather()
    assert ran == ["cpu"]


def test_an_argument_beats_use_backend(ran: list[str]) -> None:
    with ik.use_backend("reference"):
        gather(backend="cpu")
    assert ran == ["cpu"]


def test_each_thread_has_its_own_choice(ran: list[str]) -> None:
    with ik.use_backend("reference"):
        thread = threading.Thread(target=gather)
        thread.start()
        thread.join()
        gather()
    assert ran == ["cpu", "reference"]


def test_the_backward_runs_where_the_forward_did(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for backend in (CPU, REFERENCE):
        spy_on(monkeypatch, backend, "expand_tokens", names)
    x = X.clone().requires_grad_()
    with ik.use_backend("reference"):
        out = gather_of(x)
    out.sum().backward()
    assert names == ["reference"]


def test_a_block_passes_its_choice_on(ran: list[str]) -> None:
    block = Block(8, 2, norm_layer=torch.nn.RMSNorm).eval()  # a norm that is not fused: gather_tokens runs
    with torch.no_grad():
        ik.idle_block(X, block, 2, backend="reference")
        with ik.use_backend("reference"):
            ik.idle_block(X, block, 2)
        assert set(ran) == {"reference"}
        ran.clear()
        ik.idle_block(X, block, 2)
    assert set(ran) == {"cpu"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_code_follows_use_backend(ran: list[str], compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gather_of, fullgraph=True, backend=compiler)
    compiled(X)
    with ik.use_backend("reference"):
        compiled(X)
    compiled(X)
    assert ran == ["cpu", "reference", "cpu"]


@pytest.mark.parametrize("backend", ["", "CPU", "cpp", "Triton", "native"])
def test_unknown_names(backend: str) -> None:
    names = r"\['auto', 'triton', 'cuda', 'cpu', 'reference'\]"
    with pytest.raises(ValueError, match=f"^gather_tokens: backend must be one of {names}, got '{backend}'"):
        gather(backend=backend)
    with pytest.raises(ValueError, match="^idle_block: backend must be one of"):
        ik.idle_block(X, Block(8, 2), 2, backend=backend)
    with pytest.raises(ValueError, match="^use_backend: .* must be one of"), ik.use_backend(backend):
        pytest.fail("the context was entered")


@pytest.mark.parametrize("backend", [None, 3, torch.float32])
def test_names_of_the_wrong_type(backend: object) -> None:
    with pytest.raises((TypeError, ValueError), match="must be one of"):
        gather(backend=backend)
    with pytest.raises((TypeError, ValueError), match="must be one of"), ik.use_backend(backend):
        pytest.fail("the context was entered")


# A named backend that cannot run


def scores_of(x: torch.Tensor, **kwargs) -> torch.Tensor:
    return ik.token_scores(x, x[:, 0], None, None, 1e-6, **kwargs)


def test_every_reason_is_named() -> None:
    wide = torch.randn(1, 3, cpu.extension().MAX_CHANNELS + 1)
    with pytest.raises(ik.BackendError) as error:
        scores_of(wide, backend="cpu")
    text = str(error.value)
    assert error.value.op == "token_scores" and len(error.value.reasons["cpu"]) == 1
    assert f"float32[1, 3, {wide.shape[2]}] on cpu" in text and f"float32[1, {wide.shape[2]}] on cpu" in text
    assert f"at most {cpu.extension().MAX_CHANNELS} channels, not {wide.shape[2]}" in text
    assert "backend 'cpu' cannot run it" in text


def test_auto_runs_what_the_native_kernels_cannot() -> None:
    wide = torch.randn(1, 3, cpu.extension().MAX_CHANNELS + 1)
    torch.testing.assert_close(scores_of(wide), scores_of(wide, backend="reference"))


def test_kernels_that_hold_no_row_take_any_width() -> None:
    wide, indices = torch.randn(1, 3, cpu.extension().MAX_CHANNELS + 1).half(), torch.tensor([[1]])
    assert torch.equal(ik.gather_tokens(wide, indices, backend="cpu"), wide[:, 1:2])
    assert torch.equal(ik.scatter_tokens(wide, indices, wide[:, :1], backend="cpu")[:, 1], wide[:, 0])


def test_meta_tensors_have_no_kernel() -> None:
    x, indices = torch.empty(2, 5, 8, device="meta"), torch.empty(2, 2, dtype=torch.int64, device="meta")
    assert ik.gather_tokens(x, indices).device.type == "meta"


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_without_a_gpu(backend: str) -> None:
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter runs on CPU tensors")
    with pytest.raises(ik.BackendError, match="gather_tokens: no usable backend for float32") as error:
        gather(backend=backend)
    assert len(error.value.reasons[backend]) >= 2  # the tensor is on the CPU, and there is no GPU at all
    assert any("on cpu" in reason for reason in error.value.reasons[backend])
    for reason in error.value.reasons[backend]:
        assert reason in str(error.value)


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_the_block_raises_too() -> None:
    with pytest.raises(ik.BackendError, match="no usable backend"):
        ik.idle_block(X, Block(8, 2), 2, backend="cuda")


def test_a_refusal_is_not_forgotten() -> None:
    """What was chosen for one call holds for others only where it must."""
    limit = cpu.extension().MAX_CHANNELS
    for channels in (limit, limit + 1, limit, limit + 1):
        x = torch.randn(1, 3, channels)
        if channels > limit:
            with pytest.raises(ik.BackendError, match="channels"):
                scores_of(x, backend="cpu")
        assert scores_of(x).isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_answers(name: str) -> None:
    """Whether or not it can run here, and without raising."""
    backend = backends.named(name)
    assert backend.name == name
    assert all(isinstance(reason, str) and reason for reason in backend.installed())
    for reasons in (backend.reasons("gather_tokens", (X, INDICES)), backend.reasons("no_such_op", (X,))):
        assert all(isinstance(reason, str) and reason for reason in reasons)
    assert backend.reasons("no_such_op", (X,)) or name == "reference"
    assert backend.kernel("no_such_op") is None and backend.kernel("installed") is None


def test_auto_logs_each_cause_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_fallback.cache_clear()
    x = torch.randn(1, 3, cpu.extension().MAX_CHANNELS + 1)
    indices = torch.tensor([[0]])
    with caplog.at_level(logging.DEBUG, logger="idlevit_kernels"):
        for _ in range(3):
            scores_of(x)
        assert len(caplog.records) == 1
        for _ in range(3):
            ik.gather_add_norm(x, indices, x[:, :1], None, 1.0, None, None, 1e-6)
        gather()
    first, second = (record.getMessage() for record in caplog.records)
    assert "token_scores" in first and "'cpu' not used" in first and "channels" in first
    assert "gather_add_norm" in second


# The variable


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)


WHICH = """
import torch, idlevit_kernels as ik
from idlevit_kernels.ops.backends import CPU, REFERENCE
for backend in (CPU, REFERENCE):
    def kernel(op, name=backend.name, run=backend.kernel("select_tokens")):
        return lambda *a: print(name) or run(*a)
    backend.kernel = kernel
call = lambda **k: ik.select_tokens(torch.rand(1, 4), 2, **k)
call()
with ik.use_backend("cpu"):
    call()
call(backend="cpu")
import threading
thread = threading.Thread(target=call); thread.start(); thread.join()
"""


def test_environment_variable() -> None:
    result = python(WHICH, IDLEVIT_BACKEND="reference")
    assert result.stdout.split() == ["reference", "cpu", "cpu", "reference"], result.stderr


@pytest.mark.parametrize("variable", ["IDLEVIT_BACKEND", "IDLEVIT_CPU_ISA"])
def test_invalid_environment_variable(variable: str) -> None:
    result = python(
        "import torch, idlevit_kernels as ik; ik.select_tokens(torch.rand(1, 4), 2)", **{variable: "fastest"}
    )
    assert result.returncode != 0
    assert f"ValueError: {variable}" in result.stderr and "one of" in result.stderr and "'fastest'" in result.stderr


def test_instruction_set_variable() -> None:
    script = "from idlevit_kernels.ops.backends import cpu; print(cpu.extension().cpu_instruction_set())"
    assert python(script, IDLEVIT_CPU_ISA="baseline").stdout.strip() == "baseline"


def test_instruction_sets() -> None:
    extension = cpu.extension()
    assert extension.cpu_instruction_sets()[0] == "baseline"
    assert extension.cpu_instruction_set() in extension.cpu_instruction_sets()
    with pytest.raises(ValueError, match="'sse9'"):
        extension.cpu_set_instruction_set("sse9")
