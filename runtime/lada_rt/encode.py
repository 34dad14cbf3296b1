"""Vocal to codes: level, windows, trimming.

Source: spec/mucodec 2.1, 2.2, 2.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lada_rt.engines.base import Engine
from lada_rt.errors import AudioError
from lada_rt.geometry import CodecGeometry

__all__ = ["clamped_peak", "encode", "encode_window", "prepare_vocal"]

PEAK_LIMIT = 0.8
PEAK_BLOCK_SAMPLES = 1 << 20


def prepare_vocal(samples: np.ndarray, peak: float | None = None) -> np.ndarray:
    """Clean and level a vocal as the encoder expects it (spec/mucodec 2.1).

    NaN becomes 0, infinities +-1, everything is clamped to [-1, 1]; a peak above 0.8 is scaled down to it, a lower
    one left.

    Args:
        samples: [C, N] float, one or two channels, 48 kHz.
        peak: largest magnitude of the clamped vocal when `samples` is a part of it; None looks for it here.

    Returns:
        [2, N] float32, a new array; a mono channel is repeated.

    Raises:
        AudioError: not one or two channels, or no samples.
    """
    if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.shape[1] == 0:
        raise AudioError(f"vocal: expected [1 or 2 channels, at least 1 sample], got shape {list(samples.shape)}")
    audio = _clamped(samples)
    divisor = np.float32(np.abs(audio).max() if peak is None else peak)
    if divisor > PEAK_LIMIT:
        audio /= divisor / np.float32(PEAK_LIMIT)
    return np.repeat(audio, 2, axis=0) if audio.shape[0] == 1 else audio


def clamped_peak(samples: np.ndarray) -> float:
    """Largest magnitude of a vocal [C, N] once clamped to [-1, 1], found block by block to hold no second copy."""
    blocks = range(0, samples.shape[1], PEAK_BLOCK_SAMPLES)
    return max(float(np.abs(_clamped(samples[:, i : i + PEAK_BLOCK_SAMPLES])).max()) for i in blocks)


def _clamped(samples: np.ndarray) -> np.ndarray:
    audio = np.nan_to_num(samples.astype(np.float32, copy=True), copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.clip(audio, -1.0, 1.0, out=audio)


def encode_window(audio: np.ndarray, index: int, geometry: CodecGeometry) -> np.ndarray:
    """Window `index` of `audio` [2, N], taken from the song repeated without end: [2, encode_window_samples].

    The released program doubles the buffer until it is long enough and cuts contiguous windows; that is this periodic
    extension (spec/mucodec 2.2).
    """
    start = index * geometry.encode_window_samples
    n_samples = audio.shape[1]
    if start + geometry.encode_window_samples <= n_samples:
        return audio[:, start : start + geometry.encode_window_samples]
    window = np.empty((audio.shape[0], geometry.encode_window_samples), np.float32)
    filled = 0
    source = start % n_samples
    while filled < window.shape[1]:
        take = min(n_samples - source, window.shape[1] - filled)
        window[:, filled : filled + take] = audio[:, source : source + take]
        filled += take
        source = 0
    return window


def encode(
    engine: Engine,
    vocal: np.ndarray,
    geometry: CodecGeometry,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Encode a vocal to one token for each 40 ms.

    Only the windows that contribute are encoded; the released program often encodes one more and drops it.

    Args:
        engine: the `encoder` stage.
        vocal: [1 or 2, N] float at 48 kHz.
        geometry: rates and window sizes.
        on_window: called with (windows done, windows in all), first with 0.

    Returns:
        [T] int64, T = `geometry.n_codes(N)`.

    Raises:
        AudioError: see `prepare_vocal`.
    """
    if vocal.ndim != 2 or vocal.shape[0] not in (1, 2) or vocal.shape[1] == 0:
        raise AudioError(f"vocal: expected [1 or 2 channels, at least 1 sample], got shape {list(vocal.shape)}")
    peak = clamped_peak(vocal)
    n_codes = geometry.n_codes(vocal.shape[1])
    n_windows = math.ceil(n_codes / geometry.encode_window_codes)
    pieces = []
    on_window(0, n_windows)
    for index in range(n_windows):
        window = prepare_vocal(encode_window(vocal, index, geometry), peak)  # [2, N], one window at a time
        pieces.append(engine.run(audio=window[None])["codes"][0])  # [encode_window_codes]
        on_window(index + 1, n_windows)
    return np.concatenate(pieces)[:n_codes].astype(np.int64)
