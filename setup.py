"""Drives CMake and Ninja to build idlevit_kernels/_C. Everything that is not code is in pyproject.toml.

Environment: IDLEVIT_CUDA = auto | 0 | 1, IDLEVIT_CUDA_ARCHS = semicolon list, and what CMake reads itself
(CXX, CXXFLAGS, CUDACXX, CMAKE_BUILD_PARALLEL_LEVEL).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
CXX_NAMES = ("c++", "g++", "clang++")
DEFAULT_CUDA_ARCHS = ("80", "90", "100", "120")


def first_line_of(command: list[str]) -> str | None:
    """First line that `command` prints, or None if it cannot run."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return (done.stdout.strip() or "unknown version").splitlines()[0]
    return None


def find_cxx() -> tuple[str | None, str]:
    """The C++ compiler and its version; or None and why nothing can be compiled."""
    named = os.environ.get("CXX")
    for name in [named] if named else CXX_NAMES:
        version = first_line_of([*shlex.split(name), "--version"])
        if version:
            if not Path(sysconfig.get_path("include"), "Python.h").is_file():
                return None, "Python.h not found: install the headers of this Python (python3-dev), then install again"
            return name, version
    if named:
        raise PlatformError(f"CXX={named!r} does not run: name a C++17 compiler, or unset CXX to search for one")
    return None, f"no C++ compiler ({', '.join(CXX_NAMES)} not found): install g++ or set CXX, then install again"


def find_nvcc() -> str | None:
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    named = os.environ.get("CUDACXX")
    names = [named] if named else [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cuda_archs(nvcc: str) -> list[str]:
    """What IDLEVIT_CUDA_ARCHS names; by default those of ours that this nvcc can compile for."""
    named = os.environ.get("IDLEVIT_CUDA_ARCHS")
    if named:
        return [arch.strip() for arch in named.split(";") if arch.strip()]
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in DEFAULT_CUDA_ARCHS if f"sm_{arch}" in known]


def find_cuda(missing: str | None) -> tuple[str | None, list[str], str | None]:
    """nvcc and the architectures to build for; or None, [] and the reason why CUDA is not built."""
    wanted = os.environ.get("IDLEVIT_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise PlatformError(f"IDLEVIT_CUDA={wanted!r}: expected auto, 0 or 1")
    if wanted == "0":
        return None, [], "switched off by IDLEVIT_CUDA=0"
    nvcc = find_nvcc()
    if missing:
        reason = f"nothing can be compiled: {missing}"
    elif not any(ROOT.glob("csrc/cuda/*.cu")):
        reason = "this version has no CUDA sources"
    elif nvcc is None:
        reason = "nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    elif not (archs := cuda_archs(nvcc)):
        reason = f"{nvcc} compiles for none of sm_{', sm_'.join(DEFAULT_CUDA_ARCHS)}"
    else:
        return nvcc, archs, None
    if wanted == "1":
        raise PlatformError(f"IDLEVIT_CUDA=1, but {reason}")
    return None, [], reason


def find_tool(name: str) -> str:
    # The second place matters for a virtual environment that is used without being activated.
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise PlatformError(f"{name} not found: `python -m pip install {name}`, or leave out --no-build-isolation")
    return path


def warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
    # pip hides the output of a build that succeeds, so tell the terminal as well.
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\nWARNING: {text}\n")


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.cxx, cxx_text = find_cxx()  # text: the compiler's version, or why there is none
        self.nvcc, self.archs, cuda_reason = find_cuda(missing=None if self.cxx else cxx_text)
        (ext,) = self.extensions
        ext.optional = self.cxx is None  # or else setuptools asks for the file
        module = self.module_path(ext)
        build_info = module.with_name("_build_info.json")
        for old in (module, build_info):  # must not outlive a build that fails or is left out
            old.unlink(missing_ok=True)
        if self.cxx is None:
            warn(f"idlevit_kernels is installed WITHOUT its native kernels: {cxx_text}")
        super().run()
        info = {
            "native": self.cxx is not None,
            "reason": None if self.cxx else cxx_text,
            "cxx": cxx_text if self.cxx else None,
            "cuda": self.nvcc is not None,
            "cuda_reason": cuda_reason,
            "cuda_archs": self.archs,
            "version": self.distribution.get_version(),
        }
        build_info.parent.mkdir(parents=True, exist_ok=True)
        build_info.write_text(json.dumps(info, indent=2) + "\n")

    def module_path(self, ext: Extension) -> Path:
        return Path(self.get_ext_fullpath(ext.name)).resolve()

    def build_extension(self, ext: Extension) -> None:
        if self.cxx is None:
            return
        module = self.module_path(ext)
        # From scratch: CMake's cache would name the tools of an isolated environment that is gone.
        build_dir = Path(self.build_temp, "cmake").resolve()
        shutil.rmtree(build_dir, ignore_errors=True)
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DIDLEVIT_OUTPUT_DIR={module.parent}",
            f"-DIDLEVIT_CUDA={'ON' if self.nvcc else 'OFF'}",
        ]
        if self.nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={self.nvcc}", f"-DIDLEVIT_CUDA_ARCHS={';'.join(self.archs)}"]
        try:
            env = {**os.environ, "CXX": self.cxx}
            subprocess.run(configure, check=True, env=env)
            subprocess.run([configure[0], "--build", str(build_dir)], check=True, env=env)
        except subprocess.CalledProcessError:
            hint = " (IDLEVIT_CUDA=0 builds without CUDA)" if self.nvcc else ""
            raise ExecError(f"the native kernels do not build, see the messages above{hint}") from None


setup(ext_modules=[Extension("idlevit_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
