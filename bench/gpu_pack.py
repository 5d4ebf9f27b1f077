"""Prepares for a GPU where there is none (``pack``) and takes that into use where there is one (``use``).

See pack_for_gpu.sh and first_contact.sh. In build/gpu: ``lib``, the extension; ``triton.tar.xz``, a cache that
is unpacked into ``triton`` for TRITON_CACHE_DIR; ``packed.json``, what both were made from.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
PACKAGE = ROOT / "idlevit_kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def sources(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.is_file()]


def extension_key(arch: str) -> str:
    return digest([arch.encode(), SUFFIX.encode(), *sources("csrc/**/*", "CMakeLists.txt")])


def triton_key(arch: str) -> str:
    """Of the wheel and of the kernels' lines, which its own cache keys hold."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("gpu_pack: Triton is not installed for this Python")
    library = (Path(spec.origin).parent / "_C" / "libtriton.so").read_bytes()
    ours = sources("idlevit_kernels/ops/backends/triton/*.py")
    return digest([arch.encode(), sys.version.encode(), library, *ours])


def launches_key() -> str:
    """Of all that decides which kernels are launched: where it has changed, a good cache may lack some."""
    return digest(sources("idlevit_kernels/**/*.py", "bench/gpu_steps.py", "bench/gpu_pack.py", "tests/gpu/*.py"))


# The extension


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"gpu_pack: {name} not found: `python -m pip install {name}`")
    return found


def build_extension(target: Path, arch: str) -> None:
    """_C and _build_info.json in the target folder, by cmake and ninja alone, for this Python and one architecture."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
    build = FOLDER / "cmake"
    shutil.rmtree(build, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("_C*.so"), target / "_build_info.json"):  # must not outlive a build that fails
        old.unlink(missing_ok=True)
    cmake = _tool("cmake")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DIDLEVIT_OUTPUT_DIR={target}",
        f"-DIDLEVIT_CUDA={'ON' if nvcc else 'OFF'}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DIDLEVIT_CUDA_ARCHS={arch}"] if nvcc else []),
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(build)], check=True, stdout=subprocess.DEVNULL)
    reason = None if nvcc else "nvcc was not found (CUDACXX, PATH, /usr/local/cuda)"
    info = {"native": True, "reason": None, "cxx": "cmake", "cuda": bool(nvcc), "cuda_reason": reason}
    info |= {"cuda_archs": [arch] if nvcc else [], "version": None}
    (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    shutil.rmtree(build)


# Triton: every launch on CPU tensors, compiled for the GPU's architecture by Triton's own path and not run


class _Anything:
    def __getattr__(self, name: str) -> None:
        return None


class _Target:
    """What Triton asks a driver for before it launches."""

    def __init__(self, arch: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(arch), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _stub_library() -> str:
    """A folder with an empty libcuda.so.1, to link Triton's launchers to; they are loaded where there is a real one."""
    folder = tempfile.mkdtemp()
    source = Path(folder, "empty.c")
    source.write_text("")
    library = f"{folder}/libcuda.so.1"
    subprocess.run(["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, str(source)], check=True)
    os.symlink(library, f"{folder}/libcuda.so")
    return folder


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[None]:
    """Ops on CPU tensors compute by the reference; before that their Triton kernels are compiled, and what launches
    them."""
    import triton
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build, driver

    from idlevit_kernels.ops import backends
    from idlevit_kernels.ops.backends import native
    from idlevit_kernels.ops.backends.triton import TRITON, type_reasons

    token_cut_loss = importlib.import_module("idlevit_kernels.ops.backends.triton.token_cut_loss")
    os.environ["TRITON_LIBCUDA_PATH"] = _stub_library()
    build._load_module_from_path = lambda name, path: _Anything()
    native.extension = lambda: None  # the reference computes, and a build for another Python does not matter
    driver.set_active(_Target(arch))
    run = triton.runtime.JITFunction.run
    launched: set[int] = set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **meta)
        # Triton 3.8 has one launcher for all kernels, earlier releases one a signature.
        if hasattr(nvidia, "make_launcher") and id(compiled) not in launched:
            launched.add(id(compiled))
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    def all_of_them(key: Any, configs: Sequence[Any], run: Callable[[Any], None], device: Any) -> Any:
        for config in configs[1:]:
            run(config)
        return configs[0]

    class Both(backends.Backend):
        """In the place of any backend."""

        name, device_types = "both", None

        def installed(self) -> list[str]:
            return []

        def reasons(self, op: str, args: tuple[Any, ...]) -> list[str]:
            return []

        def kernel(self, op: str) -> Callable[..., Any] | None:
            kernel, result = TRITON.kernel(op), backends.REFERENCE.kernel(op)
            if result is None:
                return None

            def both(*args: Any) -> Any:
                if kernel is not None and not type_reasons(op, {a.dtype for a in args if hasattr(a, "dtype")}):
                    kernel(*args)
                return result(*args)

            return both

    triton.runtime.JITFunction.run = compile_only
    token_cut_loss.tuned = all_of_them
    backends.choose = lambda op, backend, args: Both()
    with contextlib.suppress(RuntimeError, OSError):
        nvidia.CudaUtils()
    yield


def _cases(index: int, of: int) -> None:
    """Of ops: those of bench/gpu_steps.py's ``correct`` and of tests/gpu."""
    import torch

    from idlevit_kernels.ops import testing
    from idlevit_kernels.ops.testing import Case

    more = [
        *(Case(2, 49, 33, 11, P=2, dtype=dtype) for dtype in testing.DTYPES),
        *(Case(2, 9, C, 5, dtype=t) for t in testing.DTYPES for C in (64, 384, 768, 1024)),
        *(Case(2, 49, 64, 20, dtype=dtype) for dtype in testing.DTYPES),
        *(Case(1, T - 1, C, T // 2, dtype=torch.bfloat16) for T, C in ((197, 384), (1370, 1024))),
        Case(2, 9, 6, 4, P=2), Case(1, 9, 8, 3, P=0), Case(4, 196, 384, 137, dtype=torch.float16),
        Case(3, 196, 384, 137, P=2, dtype=torch.bfloat16),
        *(Case(1, N, 8, 1, P=0) for N in (1, 49, 196, 576, 1369, 4096, 16384)),
    ]  # fmt: skip
    jobs = [(op, case) for case in (*testing.CASES, *testing.LARGE_CASES, *more) for op in testing.OPS]
    for op, case in jobs[index::of]:
        if case.N > 2000 and op.startswith("token_cut"):
            continue  # the reference holds [B, T, T]
        for precision in ("highest", "high") if op.startswith("token_cut") else ("highest",):
            torch.set_float32_matmul_precision(precision)
            testing.run(op, testing.make_arguments(op, case), "auto")


def _steps(index: int, of: int) -> None:
    """Of bench/gpu_steps.py, at the smallest batches: no kernel depends on their size."""
    import gpu_steps
    import torch

    from idlevit_kernels.block.timing import Timing

    def once(calls: Any, *_: Any, **__: Any) -> Any:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, Timing(1.0, 1.0, 1.0, 1))

    gpu_steps.alternate = once
    gpu_steps.usable_backends = lambda device: ["auto"]
    gpu_steps.random_inputs = lambda shape, like, limit=1: [torch.randn(shape, dtype=like.dtype)]
    small: dict[str, Any] = {"batches": (2,)}
    products = {"linear": _no_linear, "scaled_dot_product_attention": lambda q, k, v, *_, **__: torch.zeros_like(v)}

    def without_products(job: Callable[[], None]) -> None:
        before = {name: getattr(torch.nn.functional, name) for name in products}
        for name, product in products.items():
            setattr(torch.nn.functional, name, product)
        try:
            job()
        finally:
            for name, product in before.items():
                setattr(torch.nn.functional, name, product)

    jobs: list[Callable[[], None]] = [
        lambda: gpu_steps.ops(print, 1e3, cpu, **small),
        *(lambda name=name, shape=shape: gpu_steps.block(print, 1e3, cpu, name, shape, **small)
          for name, shape in gpu_steps.BLOCKS.items()),
        lambda: gpu_steps.model(print, 1e3, cpu, "deit_small_patch16_224", **small),
        lambda: gpu_steps.model(print, 1e3, cpu, "deit_base_patch16_224", **small),
    ]  # fmt: skip
    cpu = torch.device("cpu")
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        for job in jobs[index::of]:
            without_products(job)
        if index == 0:
            gpu_steps.training(print, 1e3, cpu, batches=(1,))


def _no_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """What has no kernel of ours takes a CPU too long; its values do not matter here."""
    return x.new_zeros((*x.shape[:-1], weight.shape[0]))


def _models(index: int, of: int) -> None:
    """Of tests/gpu/test_gpu_model.py and test_gpu_capture.py."""
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    import test_gpu_capture
    import test_gpu_model
    import torch

    import idlevit_kernels as ik

    def infer(model: Any, dtype: Any, size: int = 64) -> None:
        with torch.no_grad():
            model.eval().to(dtype)(torch.randn(2, 3, size, size, dtype=dtype))

    def train(dtype: Any) -> None:
        wrapped = ik.IdleViTForTraining(test_gpu_model.tiny()).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = test_gpu_model.loss_of(wrapped(torch.randn(2, 3, 64, 64)), torch.arange(2))
        loss.backward()

    jobs: list[Callable[[], None]] = [
        *(lambda kwargs=kwargs, dtype=dtype: infer(test_gpu_model.tiny(**kwargs), dtype)
          for kwargs in test_gpu_model.KINDS for dtype in (torch.float32, torch.float64)),
        *(lambda dtype=dtype: infer(test_gpu_capture.idle_vit(), dtype) for dtype in (torch.float32, torch.bfloat16)),
        lambda: infer(test_gpu_model.tiny(img_size=224, embed_dim=384, num_heads=6), torch.float32, 224),
        lambda: train(torch.float32), lambda: train(torch.bfloat16),
    ]  # fmt: skip
    for job in jobs[index::of]:
        job()


def _fill(job: tuple[str, int, int, str]) -> dict[str, int]:
    name, index, of, arch = job
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "bench"))
    import gpu_steps

    cache = gpu_steps.TritonCache()
    with compiling(arch):
        globals()[name](index, of)
    return cache.counts()


def fill_triton_cache(archive: Path, arch: str) -> dict[str, int]:
    """Compiled kernels and launchers in an archive; how many were compiled, and how often one was there already."""
    folder = FOLDER / "triton"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    workers = os.cpu_count() or 1
    jobs = [(name, i, workers, arch) for name in ("_steps", "_models", "_cases") for i in range(workers)]
    total = {"hits": 0, "misses": 0}
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for counts in pool.map(_fill, jobs):
            total = {key: total[key] + counts[key] for key in total}
    for path in folder.rglob("*.source"):  # read by people alone
        path.unlink()
    # A tenth of the size; stacked cubins have much in common.
    shutil.make_archive(str(archive).removesuffix(".tar.xz"), "xztar", FOLDER, "triton")
    shutil.rmtree(folder)
    return total


# The commands


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"{sum(p.stat().st_size for p in files) / 2**20:.1f} MB"


def pack(arch: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = FOLDER / "packed.json"
    packed = json.loads(record.read_text()) if record.exists() else {}
    keys = {"arch": arch, "suffix": SUFFIX, "extension": extension_key(arch), "triton": triton_key(arch)}
    keys["launches"] = launches_key()
    if packed.get("launches") != keys["launches"]:
        packed.pop("triton", None)
    for name, target, make in (
        ("extension", FOLDER / "lib", build_extension), ("triton", FOLDER / "triton.tar.xz", fill_triton_cache)
    ):  # fmt: skip
        if packed.get(name) == keys[name] and target.exists():
            print(f"pack: {name} is up to date, {_size(target)}", flush=True)
            continue
        packed.pop(name, None)  # what is half made must not pass for made
        record.write_text(json.dumps({**keys, "extension": None, "triton": None, **packed}) + "\n")
        begin = time.perf_counter()
        found = make(target, arch)
        print(f"pack: {name} made in {time.perf_counter() - begin:.0f} s, {_size(target)} {found or ''}", flush=True)
        packed[name] = keys[name]
        record.write_text(json.dumps({**keys, "extension": None, "triton": None, **packed}) + "\n")


def gpu_arch() -> str | None:
    """Compute capability of the first GPU, 90 for 9.0; None where there is none."""
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip().replace(".", "")
    return None


def use(smoke: bool) -> None:
    """The packed extension into the package, or one built now; says whether the Triton cache is good."""
    record = FOLDER / "packed.json"
    packed = json.loads(record.read_text()) if record.exists() else {}
    arch = gpu_arch() or packed.get("arch")
    if arch is None:
        print("use: no GPU and nothing packed; the package is used as it is")
        return
    begin = time.perf_counter()
    if packed.get("extension") == extension_key(arch):
        for path in (FOLDER / "lib").iterdir():
            shutil.copy2(path, PACKAGE)
        print(f"use: the packed extension, {_size(FOLDER / 'lib')}")
    elif smoke:
        print("use: no packed extension for this source, Python and GPU; smoke builds none")
    else:
        print("use: no packed extension for this source, Python and GPU; building one", flush=True)
        build_extension(PACKAGE, arch)
        print(f"use: built in {time.perf_counter() - begin:.0f} s")
    script = "import torch, idlevit_kernels._C as c; print('use: it loads; CUDA:', c.cuda_built)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=not smoke)
    good = packed.get("triton") == triton_key(arch)
    if good:
        shutil.unpack_archive(FOLDER / "triton.tar.xz", FOLDER)
    print(f"use: the packed Triton cache {'is good' if good else 'is absent or of another wheel or source: compiling'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack").add_argument("--arch", default="90", help="compute capability without the point")
    commands.add_parser("use").add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        pack(options.arch)
    else:
        use(options.smoke)


if __name__ == "__main__":
    main()
