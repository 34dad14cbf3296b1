"""Integrated loudness (ITU-R BS.1770-4), measured with pyloudnorm where it is installed."""

from __future__ import annotations

import importlib.util
import math

import numpy as np

__all__ = ["REMEDY", "available", "integrated_lufs"]

#: what a report says when the package is missing
REMEDY = 'loudness needs pyloudnorm; install it with: pip install "lada-rt[loudness]"'
#: one gating block
MIN_SECONDS = 0.4


def available() -> bool:
    return importlib.util.find_spec("pyloudnorm") is not None


def integrated_lufs(samples: np.ndarray, rate_hz: int) -> float | None:
    """Integrated loudness of [C, N] float32.

    Args:
        samples: mono counts as the same sound from both loudspeakers, as it is played.
        rate_hz: their rate.

    Returns:
        LUFS; None for silence and for less than 0.4 s, which the measure does not define.
    """
    import pyloudnorm

    if samples.shape[1] < MIN_SECONDS * rate_hz:
        return None
    stereo = np.broadcast_to(samples, (2, samples.shape[1])) if samples.shape[0] == 1 else samples
    with np.errstate(divide="ignore"):
        lufs = float(pyloudnorm.Meter(rate_hz).integrated_loudness(stereo.T))
    return lufs if math.isfinite(lufs) else None
