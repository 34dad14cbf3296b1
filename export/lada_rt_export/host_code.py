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
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lada_rt.errors import EngineError
from torch._inductor import config, cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils import cpp_extension

__all__ = ["check_compiler", "host_compilation", "why_not_compiled"]

#: what the generated code includes, and of what that includes in turn the part that pip's headers may lack
_CUDA_HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")


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
            stack.enter_context(mock.patch.object(cpp_extension, "CUDA_HOME", str(_cuda_home())))
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
        _cuda_home()


def why_not_compiled(error: Exception) -> str:
    """The reason in one line. What a C++ compiler said comes after its command, which is longer than any message."""
    text = str(error)
    complaint = re.search(r"^.*\berror: .*$|^.*\bcannot find .*$", text, re.MULTILINE)
    return " ".join((complaint[0] if complaint else text).split())[:300]


def _cuda_home() -> Path:
    """A folder with CUDA's headers: a toolkit if there is one, else what came with pip."""
    found = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    for package, folder in (("nvidia", "cu*"), ("triton", "backends/nvidia")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            found += sorted(Path(place).glob(folder))
    for home in found:
        if all((home / "include" / header).is_file() for header in _CUDA_HEADERS):
            return home
    raise EngineError(
        f"backend torch: no CUDA headers to build packages with ({', '.join(_CUDA_HEADERS)}); install the CUDA "
        "toolkit and set CUDA_HOME, or: pip install triton"
    )


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
        # last, after whatever the user has set
        places = [*filter(None, [os.environ.get("LIBRARY_PATH")]), folder]
        with mock.patch.dict(os.environ, {"LIBRARY_PATH": os.pathsep.join(places)}):
            yield


def _has_setting() -> bool:
    """torch 2.13 has one, 2.11 and 2.12 have not."""
    return hasattr(config.cpp, "march")


def _portable(original: Any) -> Any:
    def flags(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiler, linker = original(*args, **options)
        return [flag for flag in compiler if flag not in ("march=native", "mcpu=native")], linker

    return flags
