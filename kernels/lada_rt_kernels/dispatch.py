"""Which implementation serves a call: Triton on CUDA, C++ on CPU, or the one a test names."""

from __future__ import annotations

import os

from lada_rt.errors import ParamError
from torch import Tensor

__all__ = ["IMPLS", "interpreted", "pick_impl", "seed_words"]

IMPLS = ("torch", "cpp", "triton")


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pick_impl(impl: str | None, tensor: Tensor) -> str:
    """Name of the implementation for a tensor's device, or the requested one if it can serve that device.

    Raises:
        ParamError: the name is unknown, or the implementation cannot work on that device.
    """
    device = tensor.device.type
    if impl is None:
        return "triton" if device == "cuda" else "cpp" if device == "cpu" else "torch"
    if impl not in IMPLS:
        raise ParamError(f"expected impl torch, cpp or triton, got {impl!r}; leave it out to choose by device")
    if impl == "cpp" and device != "cpu":
        raise ParamError(f"expected CPU tensors for impl cpp, got {device}; use impl triton or torch")
    if impl == "triton" and device != "cuda" and not interpreted():
        raise ParamError(f"expected CUDA tensors for impl triton, got {device}; set TRITON_INTERPRET=1 to interpret")
    return impl


def seed_words(seed: int) -> tuple[int, int]:
    """The Philox key of a seed as two int32 values, low word first: one kernel signature serves every seed."""
    words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    low, high = (word - 2**32 if word >= 2**31 else word for word in words)
    return low, high
