"""A gap in inductor's arithmetic of symbolic sizes, closed while packages are compiled.

The denoiser's sequence is a prefix and frames, P + T positions of which neither number is known. Inductor tiles
2048 P + 2048 T elements by P + T and asks whether that comes out even by `Mod(a, b) == 0`, which stays undecided for a
sum although `FloorDiv(a, b)` finds the 2048: every kernel for a GPU that joins the two fails with `CantSplit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sympy
from torch._inductor.sizevars import SizeVarAllocator
from torch.utils._sympy.functions import FloorDiv

__all__ = ["sums_divide"]


@contextmanager
def sums_divide() -> Iterator[None]:
    """Let `k P + k T` be known to be a multiple of `P + T`."""
    original = SizeVarAllocator.statically_known_multiple_of

    def multiple_of(self: SizeVarAllocator, numerator: Any, denominator: Any) -> bool:
        if original(self, numerator, denominator):
            return True
        quotient = FloorDiv(numerator, denominator) if isinstance(denominator, sympy.Add) else None
        return isinstance(quotient, sympy.Integer) and sympy.expand(quotient * denominator - numerator) == 0

    with mock.patch.object(SizeVarAllocator, original.__name__, multiple_of):
        yield
