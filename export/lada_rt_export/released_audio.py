"""The resampler of the released program: a windowed sinc over the reduced ratio of the two rates.

Only for comparing with the release, whose file reader uses it; the runtime has its own resampler.
Source: spec/clamp3.md 3.1, spec/lada_band.md, section e.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from lada_rt.errors import ParamError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["resample_frac"]

ZEROS = 24
ROLLOFF = 0.945
#: output phases per matrix product: one product for all usual rates, bounded tables for coprime ones
_PHASES = 512
#: elements of one gathered block of windows (32 MB)
_BLOCK = 1 << 23


def resample_frac(x: NDArray[Any], rate_in_hz: int, rate_out_hz: int) -> NDArray[np.float32]:
    """Resample along the last axis.

    Args:
        x: [..., N] at rate_in_hz; converted to float32.
        rate_in_hz, rate_out_hz: whole rates, 1 or more.

    Returns:
        [..., floor(N * rate_out_hz / rate_in_hz)] float32; a copy of x if the rates are equal.

    Raises:
        ParamError: a rate that is not a whole number of 1 or more, or x without an axis.
    """
    for rate in (rate_in_hz, rate_out_hz):
        if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
            raise ParamError(f"expected a whole sample rate of 1 or more, got {rate!r}; pass it in Hz")
    x = np.array(x, dtype=np.float32)
    if x.ndim == 0:
        raise ParamError("expected samples of shape [..., N], got a single number; pass an array")
    common = math.gcd(rate_in_hz, rate_out_hz)
    a, b = rate_in_hz // common, rate_out_hz // common
    n = x.shape[-1]
    n_out = n * b // a
    if a == b or n_out == 0:
        return x[..., : n_out if a != b else n]
    width = math.ceil(ZEROS * a / (ROLLOFF * min(a, b)))
    flat = x.reshape(-1, n)
    padded = np.pad(flat, ((0, 0), (width, width + a)), mode="edge")
    n_blocks = n // a + 1  # blocks of a samples in, b samples out
    out = np.empty((flat.shape[0], n_blocks, b), dtype=np.float32)
    for first in range(0, b, _PHASES):
        last = min(first + _PHASES, b)
        # taps outside are zero for these phases
        tap_first = first * a // b - width
        tap_last = min(math.ceil((last - 1) * a / b) + width, width + a - 1)
        kernel = _kernel(first, last, tap_first, tap_last, a, b)
        n_taps = tap_last - tap_first + 1
        windows = np.lib.stride_tricks.sliding_window_view(padded[:, tap_first + width :], n_taps, axis=-1)
        windows = windows[:, ::a][:, :n_blocks]  # [channels, n_blocks, n_taps]
        rows = max(1, _BLOCK // n_taps)
        for channel in range(flat.shape[0]):
            for start in range(0, n_blocks, rows):
                block = np.ascontiguousarray(windows[channel, start : start + rows])
                out[channel, start : start + rows, first:last] = block @ kernel
    return out.reshape(*x.shape[:-1], n_blocks * b)[..., :n_out].copy()


def _kernel(first: int, last: int, tap_first: int, tap_last: int, a: int, b: int) -> NDArray[np.float32]:
    """[taps, phases]: the filter of each output phase. Built in float32, as the release does."""
    r = ROLLOFF * min(a, b)
    taps = np.arange(tap_first, tap_last + 1, dtype=np.float32) / np.float32(a)
    phases = np.array([np.float32(-i / b) for i in range(first, last)], dtype=np.float32)
    t = ((taps[:, None] + phases[None, :]) * np.float32(r)).clip(-ZEROS, ZEROS) * np.float32(math.pi)
    window = np.cos(t / np.float32(2 * ZEROS)) ** 2
    safe = np.where(t == 0, np.float32(1), t)
    kernel = np.where(t == 0, np.float32(1), np.sin(safe) / safe) * window
    return (kernel / kernel.sum(axis=0, keepdims=True)).astype(np.float32)
