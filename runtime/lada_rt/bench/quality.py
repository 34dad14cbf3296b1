"""Quality beside speed, without pretrained weights: how far a run is from a better one, and how it follows its vocal.

Sources: multi-resolution STFT distance after Yamamoto et al., arXiv 1910.11480; harmonic pitch class profiles after
Gomez, 2006; onset F1 with a window of 50 ms, as LaDA-Band's evaluation uses it, by mir_eval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lada_rt.errors import EngineError, ParamError

__all__ = [
    "Measure",
    "against_reference",
    "against_vocal",
    "agreement_per_step",
    "chroma",
    "chroma_similarity",
    "onset_f1",
    "onsets",
    "stft_distance",
    "token_agreement",
]

STFT_SIZES = (512, 1024, 2048)
CHROMA_WINDOW, CHROMA_HOP = 8192, 2048
CHROMA_LOW_HZ, CHROMA_HIGH_HZ = 100.0, 5000.0
ONSET_WINDOW, ONSET_HOP = 1024, 480
ONSET_BANDS = 40
#: an onset is a peak of the flux within +-30 ms that rises this far above its local mean; at most one in 50 ms. The
#: rise, in standard deviations of the flux, is where the demo codec's reconstruction of a song (F1 0.89) stands out
#: most from that of another (0.45) on songs 90300 to 90305: at 0.35 so many weak peaks count that any music fits any
#: other (0.77, 0.60)
ONSET_NEAR_S, ONSET_MEAN_S, ONSET_GAP_S = 0.03, 0.15, 0.05
ONSET_DELTA = 1.0
ONSET_MATCH_S = 0.05
#: frames more than this far under the loudest are silence
SILENCE_DB = 60.0

Floats = NDArray[np.float32]
#: audio [C, N] and its rate to a number
Measure = Callable[[Floats, int], float]


def token_agreement(codes: NDArray[np.integer], reference: NDArray[np.integer]) -> float:
    """Share of equal codes of two runs over one vocal, [T] each.

    Raises:
        ParamError: different lengths, or none.
    """
    if codes.shape != reference.shape or codes.ndim != 1 or len(codes) == 0:
        raise ParamError(f"token agreement: expected two [T] arrays, got {codes.shape} and {reference.shape}")
    return float(np.mean(codes == reference))


def agreement_per_step(
    rows: Sequence[NDArray[np.int64]], codes: NDArray[np.integer], reference: NDArray[np.integer]
) -> list[float | None]:
    """Share of the codes committed in each step that equal the reference run's final codes.

    Args:
        rows: for every step, the positions that were masked before it, ascending.
        codes, reference: [T] final codes of the run and of the reference.

    Returns:
        One share for each step; None where a step committed nothing.
    """
    shares: list[float | None] = []
    for step, before in enumerate(rows):
        after = rows[step + 1] if step + 1 < len(rows) else before[:0]
        committed = np.setdiff1d(before, after, assume_unique=True)
        shares.append(float(np.mean(codes[committed] == reference[committed])) if len(committed) else None)
    return shares


def _frames(mono: Floats, window: int, hop: int) -> Floats:
    """[n, window] views of a signal; the last is padded with silence."""
    n = max(0, -(-(len(mono) - window) // hop)) + 1
    padded = np.pad(mono, (0, max(0, (n - 1) * hop + window - len(mono))))
    return np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][:n]


def _magnitudes(mono: Floats, window: int, hop: int, block: int = 256) -> Floats:
    """[n, window / 2 + 1] magnitudes of Hann windows, scaled so that a full-scale sine has a peak of one half."""
    frames = _frames(mono, window, hop)
    taper = (np.hanning(window + 1)[:-1] * 2 / window).astype(np.float32)
    parts = [np.abs(np.fft.rfft(frames[i : i + block] * taper, axis=1)) for i in range(0, len(frames), block)]
    return np.concatenate(parts).astype(np.float32)


def stft_distance(audio: Floats, reference: Floats) -> float:
    """Multi-resolution STFT distance: spectral convergence plus log-magnitude difference, averaged over three sizes.

    0 for equal signals; not symmetric. Magnitudes under -80 dB count as -80 dB.

    Args:
        audio, reference: [C, N] or [N], of one shape.

    Raises:
        ParamError: the shapes differ.
    """
    if audio.shape != reference.shape:
        raise ParamError(f"STFT distance: expected equal shapes, got {audio.shape} and {reference.shape}")
    total = 0.0
    for a, b in zip(np.atleast_2d(audio), np.atleast_2d(reference), strict=True):
        for size in STFT_SIZES:
            x, y = _magnitudes(a, size, size // 4), _magnitudes(b, size, size // 4)
            convergence = np.linalg.norm(y - x) / max(float(np.linalg.norm(y)), 1e-7)
            floor = np.float32(1e-4)
            log_difference = np.abs(np.log(np.maximum(y, floor)) - np.log(np.maximum(x, floor))).mean()
            total += float(convergence) + float(log_difference)
    return total / (len(STFT_SIZES) * len(np.atleast_2d(audio)))


def chroma(audio: Floats, rate_hz: int) -> Floats:
    """Harmonic pitch class profile of every frame.

    Local maxima of the spectrum between 100 Hz and 5 kHz give their energy to the pitch classes within a semitone,
    weighted by a squared cosine of the distance; each frame is scaled to a maximum of one. Silent frames are zero.

    Args:
        audio: [C, N] or [N]; channels are averaged.
        rate_hz: sample rate.

    Returns:
        [n, 12] float32, C first.
    """
    mono = np.atleast_2d(audio).mean(axis=0, dtype=np.float32)
    magnitude = _magnitudes(mono, CHROMA_WINDOW, CHROMA_HOP)
    low, high = (int(hz * CHROMA_WINDOW / rate_hz) for hz in (CHROMA_LOW_HZ, CHROMA_HIGH_HZ))
    middle = magnitude[:, low : high + 1]
    left, right = magnitude[:, low - 1 : high], magnitude[:, low + 1 : high + 2]
    frame, bin_ = np.nonzero((middle >= left) & (middle > right))
    a, b, c = (np.log(np.maximum(m[frame, bin_], 1e-12)) for m in (left, middle, right))
    # vertex of the parabola through the logarithms; the three bins hold the energy wherever the peak lies between them
    offset = 0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-9)
    energy = left[frame, bin_] ** 2 + middle[frame, bin_] ** 2 + right[frame, bin_] ** 2
    pitch = 69 + 12 * np.log2((low + bin_ + np.clip(offset, -0.5, 0.5)) * rate_hz / CHROMA_WINDOW / 440.0)
    profile = np.zeros((len(magnitude), 12))
    for nearest in (np.floor(pitch), np.floor(pitch) + 1):
        weight = np.cos(np.pi / 2 * (pitch - nearest)) ** 2
        np.add.at(profile, (frame, nearest.astype(int) % 12), energy * weight)
    top = profile.max(axis=1, keepdims=True)
    silent = top <= max(float(top.max()), 1e-12) * 10 ** (-SILENCE_DB / 10)
    return np.where(silent, 0, profile / np.maximum(top, 1e-20)).astype(np.float32)


def chroma_similarity(a: Floats, b: Floats, rate_hz: int) -> float | None:
    """Mean cosine of the chroma frames of two signals, over the frames in which both sound; None if there are none.

    The longer signal is cut.
    """
    x, y = chroma(a, rate_hz), chroma(b, rate_hz)
    n = min(len(x), len(y))
    x, y = x[:n], y[:n]
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    sounding = norms > 0
    if not sounding.any():
        return None
    return float(((x * y).sum(axis=1)[sounding] / norms[sounding]).mean())


def onsets(audio: Floats, rate_hz: int) -> NDArray[np.float64]:
    """Times of note onsets in seconds, ascending.

    Spectral flux of log energies in 40 bands, a hop of 10 ms at 48 kHz: a frame is an onset where it is the largest
    within 30 ms, stands out from the mean of the 150 ms around it, and is 50 ms past the one before.

    Args:
        audio: [C, N] or [N]; channels are averaged.
        rate_hz: sample rate.
    """
    mono = np.atleast_2d(audio).mean(axis=0, dtype=np.float32)
    hop = round(ONSET_HOP * rate_hz / 48_000)
    # silence before the signal, so that an onset at its very start rises from something
    power = _magnitudes(np.pad(mono, (ONSET_WINDOW, 0)), ONSET_WINDOW, hop) ** 2
    edges = np.unique(np.geomspace(2, power.shape[1] - 1, ONSET_BANDS + 1).astype(int))
    bands = np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1)  # [n, bands]
    level = np.log10(np.maximum(bands, max(float(bands.max()), 1e-12) * 10 ** (-SILENCE_DB / 10)))
    flux = np.maximum(np.diff(level, axis=0), 0).mean(axis=1)
    near, around = (max(1, round(s * rate_hz / hop)) for s in (ONSET_NEAR_S, ONSET_MEAN_S))
    padded = np.pad(flux, around)
    local_mean = np.lib.stride_tricks.sliding_window_view(padded, 2 * around + 1).mean(axis=1)
    largest = np.lib.stride_tricks.sliding_window_view(np.pad(flux, near), 2 * near + 1).max(axis=1)
    spread = max(float(flux.std()), 1e-9)
    found: list[float] = []
    for frame in np.flatnonzero((flux == largest) & (flux > local_mean + ONSET_DELTA * spread) & (flux > 0)):
        # the rise is felt once the window's middle reaches it
        time = (frame + 1) * hop / rate_hz - ONSET_WINDOW / 2 / rate_hz
        if not found or time - found[-1] >= ONSET_GAP_S:
            found.append(max(0.0, time))
    return np.array(found)


def onset_f1(times_s: NDArray[np.float64], reference_s: NDArray[np.float64]) -> float:
    """F-measure of onset times, matched one to one within 50 ms.

    Raises:
        EngineError: mir_eval is not installed.
    """
    try:
        from mir_eval.onset import f_measure
    except ImportError:
        raise EngineError("onset F1: mir_eval is missing; install it with: pip install mir_eval") from None
    if len(times_s) == 0 or len(reference_s) == 0:
        return 0.0
    return float(f_measure(np.asarray(reference_s), np.asarray(times_s), window=ONSET_MATCH_S)[0])


def against_reference(
    codes: NDArray[np.integer],
    audio: Floats,
    rows: Sequence[NDArray[np.int64]],
    reference_codes: NDArray[np.integer],
    reference_audio: Floats,
    rate_hz: int,
) -> Mapping[str, float | list[float | None] | None]:
    """What a run lost against the run with the most steps; arguments as for the single measures."""
    return {
        "token_agreement": token_agreement(codes, reference_codes),
        "token_agreement_per_step": agreement_per_step(rows, codes, reference_codes),
        "stft_distance": stft_distance(audio, reference_audio),
        "chroma_similarity": chroma_similarity(audio, reference_audio, rate_hz),
    }


def against_vocal(audio: Floats, vocal: Floats, rate_hz: int) -> Mapping[str, float | None]:
    """How an accompaniment follows its vocal: onset F1 (None without mir_eval) and chroma similarity, in [0, 1]."""
    try:
        f1 = onset_f1(onsets(audio, rate_hz), onsets(vocal, rate_hz))
    except EngineError:
        return {"onset_f1": None, "chroma_similarity": chroma_similarity(audio, vocal, rate_hz)}
    return {"onset_f1": f1, "chroma_similarity": chroma_similarity(audio, vocal, rate_hz)}
