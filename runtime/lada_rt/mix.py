"""Vocal plus accompaniment, kept below a true-peak ceiling by a look-ahead limiter.

The vocal keeps unity gain (spec/lada_band e). The sum may pass full scale, and while it is streamed nobody knows by how
much it will, so a gain for the whole song cannot be chosen in advance. Instead the sum, both channels alike, is turned
down only around the moments that need it: down within 5 ms before a peak, back at 40 dB a second. Where nothing
reaches the ceiling the output is the plain sum, bit for bit. Everything happens on a fixed grid of blocks counted from
the start of the song, so the bytes do not depend on how the audio was cut into chunks: a file and a pipe get the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lada_rt.audio import mix_vocal

__all__ = ["CEILING_DBTP", "Limiter", "MixGain", "Mixer", "true_peak"]

CEILING_DBTP = -1.0
#: gain is decided once for each segment, blocks are the unit of work
SEGMENT_SAMPLES = 64
BLOCK_SEGMENTS = 75
BLOCK_SAMPLES = SEGMENT_SAMPLES * BLOCK_SEGMENTS
#: how far ahead the gain starts to fall, 5.3 ms
LOOKAHEAD_SEGMENTS = 4
RELEASE_DB = 40.0 * SEGMENT_SAMPLES / 48_000
#: fourfold oversampling (ITU-R BS.1770-4, annex 2), by a Kaiser-windowed sinc flat within 0.01 dB up to 20 kHz
OVERSAMPLING = 4
HALO_SAMPLES = 12
_TAPS = np.arange(-HALO_SAMPLES * OVERSAMPLING, HALO_SAMPLES * OVERSAMPLING + 1)
_KERNEL = np.sinc(_TAPS / OVERSAMPLING) * np.kaiser(len(_TAPS), 6.0)
#: impulse response of each phase between two samples
_PHASES = [_KERNEL[phase::OVERSAMPLING] for phase in range(1, OVERSAMPLING)]
#: no interpolated peak exceeds the samples around it by more
_OVERSHOOT = max(float(np.abs(phase).sum()) for phase in _PHASES)


@dataclass(frozen=True, slots=True)
class MixGain:
    """What the limiter did.

    Attributes:
        lowest_gain_db: the most it turned down; 0 when it did nothing.
        limited_s: for how long the gain was below unity.
    """

    lowest_gain_db: float
    limited_s: float


def _segment_peaks(samples: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """True peak of each segment of a block given with its halo, [2, HALO + BLOCK + HALO]: [BLOCK_SEGMENTS] float64.

    Below `threshold` values are not worked out further and may be too low, but stay below it.
    """
    inner = np.abs(samples[:, HALO_SAMPLES:-HALO_SAMPLES]).astype(np.float64)
    if float(np.abs(samples).max()) * _OVERSHOOT > threshold:
        for channel, peaks in zip(samples.astype(np.float64), inner, strict=True):
            for phase in _PHASES:
                between = np.convolve(channel, phase, mode="valid")  # [BLOCK + 1], between a sample and its neighbour
                np.maximum(peaks, np.abs(between[1 : 1 + BLOCK_SAMPLES]), out=peaks)
    return inner.max(axis=0).reshape(BLOCK_SEGMENTS, SEGMENT_SAMPLES).max(axis=1)


def true_peak(samples: np.ndarray) -> float:
    """Largest magnitude of the waveform between and at the samples, for [C, N] float32; 0 for no samples."""
    peak = 0.0
    padded = BLOCK_SAMPLES + 2 * HALO_SAMPLES
    for start in range(0, samples.shape[1], BLOCK_SAMPLES):
        block = np.zeros((samples.shape[0], padded), np.float32)
        low, high = max(0, start - HALO_SAMPLES), min(samples.shape[1], start + BLOCK_SAMPLES + HALO_SAMPLES)
        block[:, low - start + HALO_SAMPLES : high - start + HALO_SAMPLES] = samples[:, low:high]
        peak = max(peak, float(_segment_peaks(block, threshold=peak).max()))
    return peak


class Limiter:
    """Keeps the true peak of a stream of known length below the ceiling; see the module's head."""

    def __init__(self, n_samples: int, ceiling_dbtp: float = CEILING_DBTP) -> None:
        self._n_samples = n_samples
        self._ceiling_db = ceiling_dbtp
        self._received = 0
        self._sent = 0
        # Samples from HALO before the block whose peaks come next; zeros before the song and after it.
        self._ahead = np.zeros((2, HALO_SAMPLES), np.float32)
        # The block whose gain comes next, and the gain its segments need, the one before it first.
        self._block: np.ndarray | None = None
        self._needed_db = np.zeros(1 + BLOCK_SEGMENTS)
        self._segment = 0
        self._floor = np.inf
        self._lowest_db = 0.0
        self._limited_segments = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take the next [2, n] float32 and return what is final, [2, m]; all of it once the last sample is in."""
        self._received += samples.shape[1]
        done = self._received >= self._n_samples
        self._ahead = np.concatenate([self._ahead, samples], axis=1)
        final = []
        step = BLOCK_SAMPLES + 2 * HALO_SAMPLES
        while self._ahead.shape[1] >= step or (done and self._sent < self._n_samples):
            short = step - self._ahead.shape[1]
            if short > 0:
                self._ahead = np.pad(self._ahead, ((0, 0), (0, short)))
            final.append(self._advance(self._ahead[:, :step]))
            self._ahead = self._ahead[:, BLOCK_SAMPLES:]
        self._ahead = self._ahead.copy()  # let go of what has been sent
        return np.concatenate(final, axis=1) if final else np.zeros((2, 0), np.float32)

    def _advance(self, block_and_halo: np.ndarray) -> np.ndarray:
        """Look at one more block, and finish the one before it."""
        ceiling = 10.0 ** (self._ceiling_db / 20.0)
        peaks = _segment_peaks(block_and_halo, threshold=ceiling)
        needed_db = np.minimum(0.0, self._ceiling_db - 20.0 * np.log10(np.maximum(peaks, 1e-9)))
        block, self._block = self._block, block_and_halo[:, HALO_SAMPLES:-HALO_SAMPLES]
        known, self._needed_db = self._needed_db, np.concatenate([self._needed_db[-1:], needed_db])
        if block is None:
            return np.zeros((2, 0), np.float32)
        gain = self._gain(np.concatenate([known, needed_db]))
        final = (block * gain).astype(np.float32)[:, : self._n_samples - self._sent]
        self._sent += final.shape[1]
        return final

    def _gain(self, needed_db: np.ndarray) -> np.ndarray:
        """Gain of each sample of a block, [BLOCK_SAMPLES], from what the segments around it need."""
        n = BLOCK_SEGMENTS + 1  # boundaries, both ends included
        at_boundary = np.minimum(needed_db[:-1], needed_db[1:])
        target_db = np.zeros(n)
        for ahead in range(LOOKAHEAD_SEGMENTS + 1):
            share = 1.0 - ahead / (LOOKAHEAD_SEGMENTS + 1)
            target_db = np.minimum(target_db, at_boundary[ahead : ahead + n] * share)
        # gain[k] = min(target[k], gain[k - 1] + release), as a running minimum
        rising = (self._segment + np.arange(n)) * RELEASE_DB
        floor = np.minimum(self._floor, np.minimum.accumulate(target_db - rising))
        gain_db = np.minimum(floor + rising, target_db)
        self._floor = float(floor[-2])
        self._segment += BLOCK_SEGMENTS
        self._lowest_db = min(self._lowest_db, float(gain_db.min()))
        self._limited_segments += int(np.count_nonzero(gain_db[:-1] < 0.0))
        gain = 10.0 ** (gain_db / 20.0)
        within = np.arange(SEGMENT_SAMPLES) / SEGMENT_SAMPLES
        return (gain[:-1, None] + np.diff(gain)[:, None] * within).reshape(-1)

    @property
    def gain(self) -> MixGain:
        return MixGain(self._lowest_db, self._limited_segments * SEGMENT_SAMPLES / 48_000)


class Mixer:
    """Adds the vocal to an accompaniment that comes in pieces; the result has the length of the shorter."""

    def __init__(self, vocal: np.ndarray, n_samples: int) -> None:
        """Mix `vocal` [C, M] float32 into an accompaniment of `n_samples`."""
        self._vocal = vocal
        self._position = 0
        self.n_samples = min(n_samples, vocal.shape[1])
        self._limiter = Limiter(self.n_samples)

    def push(self, accompaniment: np.ndarray) -> np.ndarray:
        """Take the next [2, n] float32 and return what is final, [2, m]."""
        stop = min(self._position + accompaniment.shape[1], self.n_samples)
        vocal = self._vocal[:, self._position : stop]
        mixed = mix_vocal(accompaniment[:, : stop - self._position], vocal)
        self._position = stop
        return self._limiter.push(mixed)

    @property
    def gain(self) -> MixGain:
        """What the limiter has done so far."""
        return self._limiter.gain
