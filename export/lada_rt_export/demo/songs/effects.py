"""Signal parts shared by voice and instruments: smoothing, convolution, rooms, levels. Needs numpy alone."""

from __future__ import annotations

import numpy as np

__all__ = ["below_full_scale", "convolve", "small_room", "smooth"]


def smooth(x: np.ndarray, width: int) -> np.ndarray:
    """Smooth a curve [n] with a Hann kernel of `width` points; the ends are held."""
    if width < 3:
        return x
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.concatenate([np.full(width, x[0]), x, np.full(width, x[-1])])
    return np.convolve(padded, kernel / kernel.sum(), "same")[width:-width]


def small_room(x: np.ndarray, rate_hz: int, wet: float, rng: np.random.Generator) -> np.ndarray:
    """Add a small room to a mono signal: a few early reflections and 0.15 to 0.4 s of diffuse decay.

    Args:
        x: [n] float32.
        wet: level of the room against the direct sound, linear.

    Returns:
        [n] float32.
    """
    seconds = float(rng.uniform(0.15, 0.4))
    m = int(seconds * rate_hz)
    t = np.arange(m) / rate_hz
    response = rng.standard_normal(m) * 10 ** (-3 * t / seconds) * np.minimum(t / 0.005, 1)
    response = response + smooth(response, max(3, rate_hz // 8000))
    response *= wet / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    for _ in range(4):
        response[int(rng.uniform(0.003, 0.025) * rate_hz)] += wet * rng.uniform(-0.5, 0.5)
    return convolve(x, response.astype(np.float32))[: len(x)]


def convolve(x: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Full linear convolution along the last axis by FFT in blocks; float32 in, float32 out."""
    m = response.shape[-1]
    block = max(4 * m, 1 << 15)
    size = 1 << int(np.ceil(np.log2(block + m - 1)))
    block = size - m + 1
    spectrum = np.fft.rfft(response.astype(np.float32), size)
    out = np.zeros((*x.shape[:-1], x.shape[-1] + m - 1), np.float32)
    for first in range(0, x.shape[-1], block):
        piece = np.fft.irfft(
            np.fft.rfft(x[..., first : first + block].astype(np.float32), size) * spectrum, size
        )
        last = min(first + size, out.shape[-1])
        out[..., first:last] += piece[..., : last - first].astype(np.float32)
    return out


def below_full_scale(x: np.ndarray, ceiling: float = 0.89) -> np.ndarray:
    """Turn a signal down until its peak is at most `ceiling`; quieter ones pass unchanged."""
    peak = float(np.max(np.abs(x), initial=0.0))
    return x if peak <= ceiling else x * np.float32(ceiling / peak)
