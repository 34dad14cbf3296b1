"""Disturb a vocal the way microphones, rooms and other throats do, so that real recordings look familiar.

Everything keeps time: an onset stays where it was. Pitch moves by fractions of a semitone only, for the
vocal must stay in tune with its accompaniment. Needs numpy alone.
"""

from __future__ import annotations

import numpy as np
from lada_rt.errors import ParamError

from lada_rt_export.demo.songs.effects import below_full_scale, shaped_noise, small_room

__all__ = ["add_noise", "augment_vocal", "equalize", "random_curve_db", "shift_formants", "shift_pitch"]

_WINDOW, _HOP = 2048, 512


def _analyse(x: np.ndarray) -> np.ndarray:
    """[N] to [frames, bins] complex64; frame i is centred on sample i * _HOP."""
    padded = np.pad(x, (_WINDOW // 2, _WINDOW // 2 + _HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    return np.fft.rfft(frames * np.hanning(_WINDOW + 1)[:-1].astype(np.float32), axis=1)


def _resynthesise(spectra: np.ndarray, n: int, hop: int = _HOP) -> np.ndarray:
    """Weighted overlap-add of [frames, bins] to [n] float32."""
    window = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)
    frames = np.fft.irfft(spectra, _WINDOW, axis=1).astype(np.float32) * window
    total = hop * (len(frames) - 1) + _WINDOW
    out, weight = np.zeros(total, np.float32), np.full(total, 1e-6, np.float32)
    for i, frame in enumerate(frames):
        out[i * hop : i * hop + _WINDOW] += frame
        weight[i * hop : i * hop + _WINDOW] += window**2
    even = (out / np.maximum(weight, 0.1))[_WINDOW // 2 :]
    return np.pad(even, (0, max(0, n - len(even))))[:n]


def shift_formants(x: np.ndarray, ratio: float) -> np.ndarray:
    """Move the spectral envelope by `ratio` and leave pitch and time alone.

    Args:
        x: [C, N] float32.
        ratio: 0.7 to 1.4; above 1 a shorter throat.

    Returns:
        [C, N] float32.

    Raises:
        ParamError: ratio out of range.
    """
    if not 0.7 <= ratio <= 1.4:
        raise ParamError(f"expected a formant ratio from 0.7 to 1.4, got {ratio}; use a smaller shift")
    out = []
    for channel in x:
        spectra = _analyse(channel)
        log = np.log(np.abs(spectra) + 1e-5)
        # the first millisecond of the cepstrum is the envelope, the rest the pitch, even of high voices
        cepstrum = np.fft.irfft(log, _WINDOW, axis=1)
        lifter = np.zeros(_WINDOW, np.float32)
        lifter[:50] = lifter[-49:] = 1
        envelope = np.fft.rfft(cepstrum * lifter, axis=1).real  # [frames, bins]
        bins = np.arange(envelope.shape[1])
        source = np.minimum(bins / ratio, bins[-1])
        low = np.minimum(source.astype(int), bins[-1] - 1)
        share = (source - low).astype(np.float32)
        moved = envelope[:, low] * (1 - share) + envelope[:, low + 1] * share
        gain = np.exp(np.clip(moved - envelope, -4, 2.5))
        out.append(_resynthesise(spectra * gain, len(channel)))
    return np.stack(out)


def shift_pitch(x: np.ndarray, semitones: float) -> np.ndarray:
    """Shift pitch and formants together by resampling; a phase vocoder restores the length.

    Args:
        x: [C, N] float32.
        semitones: -4 to 4.

    Returns:
        [C, N] float32.

    Raises:
        ParamError: semitones out of range.
    """
    if not -4 <= semitones <= 4:
        raise ParamError(f"expected a shift from -4 to 4 semitones, got {semitones}; use a smaller one")
    ratio = 2 ** (semitones / 12)
    n = x.shape[1]
    out = []
    for channel in x:
        spectra = _analyse(channel)
        # output frames are _HOP apart and read the input every _HOP / ratio samples: ratio times as long
        at = np.arange(0, len(spectra) - 1, 1 / ratio)
        low = at.astype(int)
        share = (at - low)[:, None].astype(np.float32)
        magnitude = np.abs(spectra[low]) * (1 - share) + np.abs(spectra[np.minimum(low + 1, len(spectra) - 1)]) * share
        advance = 2 * np.pi * _HOP * np.arange(spectra.shape[1]) / _WINDOW
        turn = np.angle(spectra[1:]) - np.angle(spectra[:-1]) - advance
        turn = advance + turn - 2 * np.pi * np.round(turn / (2 * np.pi))
        steps = turn[np.minimum(low, len(turn) - 1)]
        phase = np.angle(spectra[0]) + np.concatenate([np.zeros((1, steps.shape[1])), np.cumsum(steps[:-1], axis=0)])
        longer = _resynthesise(magnitude * np.exp(1j * phase), int(n * ratio) + 64)
        out.append(_read_at(longer, np.arange(n) * ratio))
    return np.stack(out)


def _read_at(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Cubic (Catmull-Rom) interpolation of [N] at fractional positions."""
    base = np.clip(positions.astype(np.int64), 1, len(x) - 3)
    f = (positions - base).astype(np.float32)
    a, b, c, d = x[base - 1], x[base], x[base + 1], x[base + 2]
    return b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))


def random_curve_db(rng: np.random.Generator, freqs_hz: np.ndarray, swing_db: float) -> np.ndarray:
    """A smooth random equaliser curve in dB over `freqs_hz`: knots an octave apart, limits at both ends of
    speech."""
    knots_hz = 62.5 * 2.0 ** np.arange(9)
    knots = rng.normal(0, swing_db, 9)
    curve = np.interp(np.log2(np.maximum(freqs_hz, 20)), np.log2(knots_hz), knots - knots.mean())
    if rng.random() < 0.5:
        high_pass = rng.uniform(60, 180)
        curve -= 10 * np.log10(1 + (high_pass / np.maximum(freqs_hz, 1)) ** 4)
    if rng.random() < 0.5:
        # recordings that once had a rate of 16 to 32 kHz, or went through a codec, end early
        low_pass = np.exp(rng.uniform(np.log(5500), np.log(15000)))
        curve -= np.minimum(10 * np.log10(1 + (freqs_hz / low_pass) ** 24), 60)
    return curve


def equalize(x: np.ndarray, curve_db: np.ndarray) -> np.ndarray:
    """Filter [C, N] with a zero-phase curve in dB given on the bins of rfft(N)."""
    return np.fft.irfft(np.fft.rfft(x) * 10 ** (curve_db / 20), x.shape[1]).astype(np.float32)


def add_noise(x: np.ndarray, rng: np.random.Generator, snr_db: float, rate_hz: int = 48000) -> np.ndarray:
    """Add coloured noise, and sometimes mains hum, `snr_db` below the level of the signal; silence gets -70
    dBFS."""
    n = x.shape[1]
    level = max(float(np.sqrt(np.mean(x**2))), 1e-3)
    low, high = float(rng.uniform(20, 300)), float(np.exp(rng.uniform(np.log(2000), np.log(18000))))
    noise = shaped_noise(rng, n, rate_hz, low, high)
    if rng.random() < 0.3:
        mains = float(rng.choice([50.0, 60.0]))
        t = np.arange(n) / rate_hz
        hum = sum(np.sin(2 * np.pi * mains * k * t + rng.uniform(0, 6.28)) / k for k in (1, 2, 3, 5))
        noise = noise + 0.5 * np.asarray(hum, np.float32)
    return x + np.float32(level * 10 ** (-snr_db / 20)) * noise


def augment_vocal(vocal: np.ndarray, seed: int, *, strength: float = 1.0, rate_hz: int = 48000) -> np.ndarray:
    """Apply a random chain: detuning, formants, equaliser, room, noise, level.

    Args:
        vocal: [C, N] float32.
        seed: non-negative; the same seed gives the same chain.
        strength: 0 changes nothing but the level, 1 is the full spread.
        rate_hz: sample rate.

    Returns:
        [C, N] float32, peak at most 0.98.

    Raises:
        ParamError: not two-dimensional, shorter than a window, or strength out of range.
    """
    if vocal.ndim != 2 or vocal.shape[1] < _WINDOW:
        raise ParamError(
            f"expected a vocal [C, N] of at least {_WINDOW} samples, got {vocal.shape}; pass a longer crop"
        )
    if not 0 <= strength <= 1:
        raise ParamError(f"expected strength from 0 to 1, got {strength}; choose one between")
    rng = np.random.default_rng(seed)
    x = vocal.astype(np.float32)
    if rng.random() < 0.3 * strength:
        x = shift_pitch(x, float(rng.uniform(-0.35, 0.35)))
    if rng.random() < 0.4 * strength:
        x = shift_formants(x, float(np.exp(rng.uniform(-0.16, 0.16) * strength)))
    if rng.random() < 0.7 * strength:
        freqs = np.fft.rfftfreq(x.shape[1], 1 / rate_hz)
        x = equalize(x, random_curve_db(rng, freqs, 3.5 * strength))
    if rng.random() < 0.4 * strength:
        wet = float(np.exp(rng.uniform(np.log(0.02), np.log(0.3))))
        room_seed = int(rng.integers(1 << 31))
        x = np.stack([small_room(c, rate_hz, wet, np.random.default_rng(room_seed)) for c in x])
    if rng.random() < 0.6 * strength:
        x = add_noise(x, rng, float(rng.uniform(18, 55)), rate_hz)
    return below_full_scale(x * np.float32(10 ** (rng.uniform(-10, 6) / 20)), 0.98)
