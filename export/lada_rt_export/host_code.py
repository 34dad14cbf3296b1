"""The host's part of a compiled package: what it is compiled with, and which processors it runs on.

A package holds C++ that inductor wrote. It has to run on the processors its key names, not only on the one that built
it; and for a GPU it needs CUDA's headers and driver library, which torch and Triton themselves do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lada_rt.errors import EngineError
from torch._inductor import config, cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils import cpp_extension

__all__ = ["check_compiler", "host_compilation", "why_not_compiled"]

#: what the generated code for a GPU includes first
_INCLUDED = "torch/csrc/inductor/aoti_include/cuda.h"
#: CUDA's header of half-precision numbers asks with this which processor is compiled for. It belongs to a package that
#: neither torch nor Triton brings; to a compiler of host code there is one answer.
_NV_TARGET = """#pragma once
#define NV_IF_ELSE_TARGET(target, on_device, ...) __VA_ARGS__
"""


@contextlib.contextmanager
def host_compilation(device: torch.device) -> Iterator[None]:
    """Let inductor compile for a kind of processor in place of the one at hand (`-march=native`), and find CUDA.

    Kernels for the CPU still use its vector instructions, as far as torch's own kernels do; those are in the key
    (`lada_rt.engines.torch.device_key`). Of a package for a GPU, whose key says nothing of the host, the host's part
    only launches kernels: it gets none.

    Raises:
        EngineError: the CUDA headers are missing.
    """
    settings: dict[str, Any] = {"cpp.simdlen": 0} if device.type == "cuda" else {}
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_cuda_headers())
            stack.enter_context(_driver_to_link())
        if _has_setting():
            stack.enter_context(config.patch({**settings, "cpp.march": ""}))
        else:
            original = cpp_builder._get_optimization_cflags
            stack.enter_context(config.patch(settings))
            stack.enter_context(mock.patch.object(cpp_builder, original.__name__, _portable(original)))
        yield


def check_compiler(device: str) -> None:
    """Look for what packages are compiled with while there is no work to lose.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        EngineError: the C++ compiler or, for a GPU, the CUDA headers are missing.
    """
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        raise EngineError(
            "backend torch: no C++ compiler to build packages with; install g++, or name one in CXX"
        ) from None
    if device == "cuda":
        with _cuda_headers():
            pass


def why_not_compiled(error: Exception) -> str:
    """The reason in one line. What a C++ compiler said comes after its command, which is longer than any message."""
    text = str(error)
    complaint = re.search(r"^.*\berror: .*$|^.*\bcannot find .*$", text, re.MULTILINE)
    return " ".join((complaint[0] if complaint else text).split())[:300]


@contextlib.contextmanager
def _cuda_headers() -> Iterator[None]:
    """CUDA's headers: those of a toolkit if there is one, else what came with torch or Triton, if they compile."""
    with tempfile.TemporaryDirectory(prefix="lada-rt-") as folder, _last_in("CPLUS_INCLUDE_PATH", folder):
        target = Path(folder) / "nv" / "target"
        target.parent.mkdir()
        target.write_text(_NV_TARGET, encoding="utf-8")
        with mock.patch.object(cpp_extension, "CUDA_HOME", str(_cuda_home())):
            yield


def _cuda_home() -> Path:
    """The first folder whose headers the compiler is content with."""
    homes = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    for package, pattern in (("nvidia", "cu*"), ("triton", "backends/nvidia")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            homes += sorted(Path(place).glob(pattern))
    complaint = "none are installed"
    for home in homes:
        if (home / "include" / "cuda.h").is_file():
            complaint = _complaint(home)
            if not complaint:
                return home
    raise EngineError(
        f"backend torch: no CUDA headers to build packages with ({complaint}); install the CUDA toolkit and "
        "set CUDA_HOME"
    )


def _complaint(home: Path) -> str:
    """What the compiler says of torch's headers for a GPU with CUDA's from there; nothing if it finds them all."""
    with mock.patch.object(cpp_extension, "CUDA_HOME", str(home)):
        includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    command = [cpp_builder.get_cpp_compiler(), "-x", "c++", "-std=c++20", "-DUSE_CUDA", *includes, "-E", "-"]
    done = subprocess.run(
        command, input=f"#include <{_INCLUDED}>", capture_output=True, text=True, errors="replace", check=False
    )
    return why_not_compiled(RuntimeError(done.stderr)) if done.returncode else ""


@contextlib.contextmanager
def _driver_to_link(soname: str = "libcuda.so.1") -> Iterator[None]:
    """Where there is no toolkit the driver's library lies about under its versioned name alone: `-lcuda` misses it."""
    try:
        ctypes.CDLL(soname)
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        loaded = ""
    name = soname.partition(".so")[0] + ".so"
    path = re.search(rf"/.*/{re.escape(name)}[.\d]*$", loaded, re.MULTILINE)
    if path is None:
        yield  # the linker may know better
        return
    with tempfile.TemporaryDirectory(prefix="lada-rt-") as folder:
        (Path(folder) / name).symlink_to(path[0])
        with _last_in("LIBRARY_PATH", folder):
            yield


def _last_in(variable: str, folder: str) -> AbstractContextManager[Any]:
    """A place where compiler and linker look after all others, those that the user has set included."""
    places = [*filter(None, [os.environ.get(variable)]), folder]
    return mock.patch.dict(os.environ, {variable: os.pathsep.join(places)})


def _has_setting() -> bool:
    """torch 2.13 has one, 2.11 and 2.12 have not."""
    return hasattr(config.cpp, "march")


def _portable(original: Any) -> Any:
    def flags(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiler, linker = original(*args, **options)
        return [flag for flag in compiler if flag not in ("march=native", "mcpu=native")], linker

    return flags
