"""Sizes that inductor has to divide: sums of two unknown lengths, as in a sequence of prefix and frames."""

from __future__ import annotations

import pytest
import sympy
from lada_rt_export.symbolic_sizes import sums_divide
from torch._inductor.sizevars import SizeVarAllocator

P, T, R = sympy.symbols("P T R", integer=True, positive=True)


@pytest.mark.parametrize(
    ("numerator", "denominator", "divides"),
    [
        (2048 * P + 2048 * T, P + T, True),
        (2048 * T + 4096, T + 2, True),
        (2048 * P + 2047 * T, P + T, False),
        (2048 * P + 2048 * T + 1, P + T, False),
        (2048 * P + 2048 * T, P + R, False),
        (2048 * T, P + T, False),
        (2048 * T, T, True),
        (2048 * T, 64, True),
    ],
)
def test_a_multiple_of_a_sum_is_known_as_such(numerator: sympy.Expr, denominator: sympy.Expr, divides: bool) -> None:
    with sums_divide():
        assert SizeVarAllocator().statically_known_multiple_of(numerator, denominator) is divides


def test_inductor_is_left_as_it_was() -> None:
    before = SizeVarAllocator.statically_known_multiple_of
    with sums_divide():
        assert SizeVarAllocator.statically_known_multiple_of is not before
    assert SizeVarAllocator.statically_known_multiple_of is before
