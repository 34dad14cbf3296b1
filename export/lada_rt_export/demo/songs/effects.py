"""Signal parts shared by voice and instruments: smoothing, convolution, rooms, levels. Needs numpy alone."""

from __future__ import annotations

import numpy as np

__all__ = [
    "below_full_scale",
    "convolve",
    "hall",
    "reverberate",
    "shaped_noise",
    "small_room",
    "smooth",
    "soft_limit",
]


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
    size = 1 << max(15, int(np.ceil(np.log2(2 * m))))
    block = size - m + 1
    spectrum = np.fft.rfft(response.astype(np.float32), size)
    out = np.zeros((*x.shape[:-1], x.shape[-1] + m - 1), np.float32)
    for first in range(0, x.shape[-1], block):
        piece = np.fft.irfft(np.fft.rfft(x[..., first : first + block].astype(np.float32), size) * spectrum, size)
        last = min(first + size, out.shape[-1])
        out[..., first:last] += piece[..., : last - first].astype(np.float32)
    return out


def below_full_scale(x: np.ndarray, ceiling: float = 0.89) -> np.ndarray:
    """Turn a signal down until its peak is at most `ceiling`; quieter ones pass unchanged."""
    peak = float(np.max(np.abs(x), initial=0.0))
    return x if peak <= ceiling else x * np.float32(ceiling / peak)


def shaped_noise(rng: np.random.Generator, n: int, rate_hz: int, low_hz: float, high_hz: float) -> np.ndarray:
    """[n] float32 noise of unit deviation between two frequencies, with slopes of 12 dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    f = np.fft.rfftfreq(n, 1 / rate_hz)
    spectrum *= 1 / (1 + (low_hz / np.maximum(f, 1e-3)) ** 2) / (1 + (f / high_hz) ** 2)
    x = np.fft.irfft(spectrum, n)
    return (x / max(float(np.std(x)), 1e-9)).astype(np.float32)


def hall(
    rng: np.random.Generator, rate_hz: int, seconds: float, damping: float = 0.5, pre_delay_s: float = 0.012
) -> np.ndarray:
    """Impulse response [2, n] float32 of a diffuse stereo room, without the direct sound, of unit energy.

    Args:
        seconds: time to fall by 60 dB at low frequencies.
        damping: 0 to 1, how much sooner the treble dies away.
    """
    n = int(seconds * rate_hz)
    t = np.arange(n) / rate_hz
    noise = rng.standard_normal((2, n))
    dull = np.stack([smooth(x, max(3, rate_hz // 6000)) for x in noise])
    decay, faster = 10 ** (-3 * t / seconds), 10 ** (-3 * t / (seconds * (1 - 0.7 * damping)))
    late = (dull * decay * 1.6 + (noise - dull) * faster) * np.minimum(t / 0.02, 1)
    response = np.concatenate([np.zeros((2, int(pre_delay_s * rate_hz))), late], axis=1)
    response -= response.mean(axis=1, keepdims=True)
    return (response / np.sqrt(np.sum(response**2, axis=1, keepdims=True))).astype(np.float32)


def reverberate(send: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve a stereo send [2, N] with a stereo response [2, n] and keep N samples."""
    return np.stack([convolve(send[c], response[c])[: send.shape[1]] for c in range(2)])


def soft_limit(x: np.ndarray, knee: float = 0.7, ceiling: float = 0.98) -> np.ndarray:
    """Leave samples below `knee` alone and bend the rest smoothly under `ceiling`."""
    over = np.abs(x) > knee
    if not over.any():
        return x
    out = x.copy()
    room = ceiling - knee
    out[over] = np.sign(x[over]) * (knee + room * np.tanh((np.abs(x[over]) - knee) / room))
    return out
