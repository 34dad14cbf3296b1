"""Mixing: unity gain, true peak against a resampler, independence of chunks, loudness."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
from lada_rt.audio import mix_vocal
from lada_rt.loudness import integrated_lufs
from lada_rt.mix import BLOCK_SAMPLES, CEILING_DBTP, Limiter, Mixer, true_peak
from stubs import sung

CEILING = 10 ** (CEILING_DBTP / 20)


def loud_music(n_samples: int, seed: int = 0) -> np.ndarray:
    """Tones and bursts of band-limited noise, partly far above full scale, [2, n] float32."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal((2, n_samples)))
    spectrum[:, int(spectrum.shape[1] * 20 / 24) :] = 0
    noise = np.fft.irfft(spectrum, n_samples)
    bursts = (np.sin(np.arange(n_samples) / 9000) > 0.6) * 1.2
    return (noise * (0.1 + bursts) + sung(n_samples)).astype(np.float32)


@pytest.mark.parametrize("case", ["noise", "quarter_rate", "high"])
def test_true_peak_agrees_with_a_resampler(case: str) -> None:
    n = np.arange(48_000)
    fade = np.minimum(1, np.minimum(n, n[::-1]) / 2000)
    signal = {
        "noise": loud_music(48_000) * fade,
        "quarter_rate": np.stack([np.sin(np.pi * n / 2 + np.pi / 4), np.sin(np.pi * n / 2)]) * fade,
        "high": np.stack([np.sin(2 * np.pi * 19_000 / 48_000 * n), np.sin(2 * np.pi * 997 / 48_000 * n)]) * fade,
    }[case].astype(np.float32)
    fine = np.abs(soxr.resample(signal.T, 48_000, 48_000 * 16, quality="VHQ")).max()
    # The nearest of four points a sample is up to 1/8 sample off the crest: cos(pi 20 / (4 48)) is -0.48 dB at 20 kHz.
    found_db, fine_db = 20 * np.log10(true_peak(signal)), 20 * np.log10(fine)
    assert fine_db - 0.5 < found_db < fine_db + 0.05


def test_true_peak_finds_what_lies_between_the_samples() -> None:
    """A sine at a quarter of the rate, sampled 45 degrees beside its crests: 3 dB above every sample."""
    n = np.arange(20_000)
    fade = np.minimum(1, np.minimum(n, n[::-1]) / 2000)
    signal = (np.sin(np.pi * n / 2 + np.pi / 4) * fade)[None].astype(np.float32)
    assert np.abs(signal).max() == pytest.approx(np.sqrt(0.5), abs=1e-3)
    assert true_peak(signal) == pytest.approx(1.0, abs=2e-3)
    assert true_peak(np.zeros((2, 0), np.float32)) == 0


@pytest.mark.parametrize("n_samples", [1, 63, 64, 65, BLOCK_SAMPLES - 1, BLOCK_SAMPLES, BLOCK_SAMPLES + 13, 100_000])
def test_limiter_does_not_depend_on_chunks(n_samples: int) -> None:
    signal = loud_music(max(n_samples, 64))[:, :n_samples] * np.float32(2)
    whole = Limiter(n_samples).push(signal)
    assert whole.shape == signal.shape
    rng = np.random.default_rng(n_samples)
    for longest in (7, 999, 30_000):
        limiter, pieces, start = Limiter(n_samples), [], 0
        while start < n_samples:
            size = int(rng.integers(1, longest + 1)) if n_samples < 20_000 or longest > 7 else 500
            pieces.append(limiter.push(signal[:, start : start + size]))
            start += size
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_limiter_holds_the_ceiling_and_says_so() -> None:
    signal = loud_music(200_000)
    assert true_peak(signal) > 2
    limiter = Limiter(signal.shape[1])
    out = limiter.push(signal)
    assert 20 * np.log10(true_peak(out)) < CEILING_DBTP + 0.05
    assert true_peak(out) > 0.8
    gain = limiter.gain
    expected_db = CEILING_DBTP - 20 * np.log10(true_peak(signal))
    assert gain.lowest_gain_db == pytest.approx(expected_db, abs=1e-6)
    assert 0 < gain.limited_s < 200_000 / 48_000
    applied = np.divide(out, signal, out=np.ones_like(out), where=np.abs(signal) > 1e-2)
    assert applied.max() < 1 + 1e-5
    assert applied.min() > 10 ** (expected_db / 20) * 0.9999
    # Left and right get the same gain, so the image does not move.
    both = (np.abs(signal) > 1e-2).all(axis=0)
    np.testing.assert_allclose(applied[0, both], applied[1, both], rtol=1e-5)


def test_limiter_leaves_the_rest_alone() -> None:
    """Bit for bit the input more than the look-ahead before a peak, and once the gain is back after it."""
    signal = np.stack([sung(300_000), sung(300_000, seed=1)])
    signal[:, 150_000] = 2.0
    limiter = Limiter(300_000)
    out = limiter.push(signal)
    assert np.abs(out[:, 150_000]).max() <= CEILING
    np.testing.assert_array_equal(out[:, : 150_000 - 6 * 64], signal[:, : 150_000 - 6 * 64])
    back = 150_000 + int(-limiter.gain.lowest_gain_db / 40 * 48_000) + 2 * 64
    np.testing.assert_array_equal(out[:, back:], signal[:, back:])


def test_quiet_mix_is_the_plain_sum() -> None:
    accompaniment = np.stack([sung(100_000, seed=2), sung(100_000, seed=3)])
    vocal = sung(90_000)[None]
    mixer = Mixer(vocal, 100_000)
    pieces = [mixer.push(accompaniment[:, i : i + 33_333]) for i in range(0, 100_000, 33_333)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), mix_vocal(accompaniment, vocal))
    assert mixer.gain.lowest_gain_db == 0
    assert mixer.gain.limited_s == 0
    assert mixer.n_samples == 90_000


def test_loudness() -> None:
    """A full-scale 997 Hz sine in one channel is -3.01 LUFS by the definition of the measure, in both 3 dB more."""
    tone = np.sin(2 * np.pi * 997 / 48_000 * np.arange(48_000 * 5))[None].astype(np.float32)
    left = np.concatenate([tone, np.zeros_like(tone)])
    assert integrated_lufs(left, 48_000) == pytest.approx(-3.01, abs=0.05)
    assert integrated_lufs(tone, 48_000) == pytest.approx(0.0, abs=0.05)
    assert integrated_lufs(np.zeros((2, 48_000), np.float32), 48_000) is None
    assert integrated_lufs(tone[:, :100], 48_000) is None
