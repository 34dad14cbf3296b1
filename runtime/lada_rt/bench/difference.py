"""How far a result is from what it should be."""

from __future__ import annotations

import numpy as np

__all__ = ["relative_error"]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest expected value; for ids the share that differs; infinite for other shapes."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if expected.dtype.kind in "iu":
        return float(np.mean(found != expected))
    scale = float(np.abs(expected).max())
    return float(np.abs(found.astype(np.float64) - expected).max()) / max(scale, 1e-30)
