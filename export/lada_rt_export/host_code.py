"""Which processors the compiled host code of a package runs on: those its key names, not only the one that built it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, cpp_builder

__all__ = ["no_native_code"]


@contextmanager
def no_native_code(device: torch.device) -> Iterator[None]:
    """Let inductor compile for a kind of processor in place of the one at hand (`-march=native`).

    Kernels for the CPU still use its vector instructions, as far as torch's own kernels do; those are in the key
    (`lada_rt.engines.torch.device_key`). Of a package for a GPU, whose key says nothing of the host, the host's part
    only launches kernels: it gets none.
    """
    settings: dict[str, Any] = {"cpp.simdlen": 0} if device.type == "cuda" else {}
    if _has_setting():
        with config.patch({**settings, "cpp.march": ""}):
            yield
    else:
        original = cpp_builder._get_optimization_cflags
        with config.patch(settings), mock.patch.object(cpp_builder, original.__name__, _portable(original)):
            yield


def _has_setting() -> bool:
    """torch 2.13 has one, 2.11 and 2.12 have not."""
    return hasattr(config.cpp, "march")


def _portable(original: Any) -> Any:
    def flags(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiler, linker = original(*args, **options)
        return [flag for flag in compiler if flag not in ("march=native", "mcpu=native")], linker

    return flags
