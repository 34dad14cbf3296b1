"""Rows of signed strengths and the grains that play them: the mel of the trained demo bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lada_rt.bench.quality import onset_f1, onsets
from lada_rt.errors import ParamError
from lada_rt_export.demo.evaluate import chord_match
from lada_rt_export.demo.songs.song import Song, make_song
from lada_rt_export.demo.training import grains
from lada_rt_export.models.vocoder import VocoderConfig

RATE_HZ = 48_000
CYCLE_S = 0.16


def played(audio: np.ndarray) -> np.ndarray:
    """Measured and played again: [B, N] float32, N a multiple of 480."""
    return grains.play_rows(grains.rows_of(grains.strengths(torch.from_numpy(audio)))).numpy()


def level_db(x: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(x, dtype=np.float64)))


@pytest.fixture(scope="module")
def song() -> Song:
    return make_song(90_001, duration_s=16.0)


def test_pitches_are_fifteen_cents_off_on_average_above_the_bass() -> None:
    layout = grains._layout()
    slot = layout.row % 8 // 2
    turns = layout.hz * 0.01
    placed = layout.sign * (2 * slot + 1) / 16
    off_hz = np.abs((placed - turns + 0.5) % 1 - 0.5) * 100
    assert sorted(layout.row) == list(range(0, 144, 2))
    assert off_hz.max() < 9
    assert (1200 * np.log2(1 + off_hz / layout.hz))[layout.hz > 110].mean() < 16


@pytest.mark.parametrize("midi", [36, 45, 52, 60, 69, 81, 96])
def test_a_semitone_comes_back_at_its_pitch_and_level(midi: int) -> None:
    hz = 440 * 2 ** ((midi - 69) / 12)
    t = np.arange(2 * RATE_HZ) / RATE_HZ
    tone = (0.3 * np.sin(2 * np.pi * hz * t + 1)).astype(np.float32)
    out = played(tone[None])[0]
    middle = slice(RATE_HZ // 2, RATE_HZ // 2 + RATE_HZ)
    assert abs(level_db(out[middle]) - level_db(tone[middle])) < 1.5
    power = np.abs(np.fft.rfft(out[middle] * np.hanning(RATE_HZ))) ** 2
    freqs = np.arange(len(power))  # one second: a bin is 1 Hz
    near = np.abs(freqs - hz) < 40
    assert power[near].sum() > 0.9 * power.sum()
    # the four turns put lines 2 / CYCLE_S apart; as many tones have to share each, so a few go to the next but one
    assert abs((power * freqs)[near].sum() / power[near].sum() - hz) < 1.5 / CYCLE_S


def test_noise_comes_back_at_its_level_in_each_part_of_the_spectrum() -> None:
    noise = (0.05 * np.random.default_rng(1).standard_normal((1, 3 * RATE_HZ))).astype(np.float32)
    spectra = [np.abs(np.fft.rfft(x[0])) ** 2 for x in (noise, played(noise))]
    for low, high in ((100, 400), (400, 1500), (1500, 5000), (5000, 16_000)):
        a, b = (s[3 * low : 3 * high].sum() for s in spectra)
        assert abs(10 * np.log10(b / a)) < 3, (low, high)


def test_silence_stays_silent_and_strengths_are_not_negative(song: Song) -> None:
    assert not played(np.zeros((1, 9600), np.float32)).any()
    found = grains.strengths(torch.from_numpy(song.accompaniment[:, : 8 * RATE_HZ]))
    assert found.shape == (2, 256, 800)
    assert found.dtype == torch.float32
    assert float(found.min()) >= 0
    assert not found[:, 216:].any()
    assert float(found.max()) < 4.0  # what the vocoder's first offset holds


def test_chords_and_onsets_of_a_song_survive(song: Song) -> None:
    truth = song.accompaniment[:, : len(song.accompaniment[0]) // 480 * 480]
    out = played(truth)
    assert abs(level_db(out) - level_db(truth)) < 1
    found, best = chord_match(out, song), chord_match(truth, song)
    assert found is not None
    assert best is not None
    assert found > 0.7 * best
    f1 = onset_f1(onsets(out, RATE_HZ), onsets(truth, RATE_HZ))
    assert f1 is not None
    assert f1 > 0.6


def test_textures_change_sign_after_half_a_cycle_and_do_not_depend_on_the_bin() -> None:
    texture = grains.textures()
    assert texture.shape == (256, 16)
    torch.testing.assert_close(texture[:, 8:], -texture[:, :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(texture.square().mean(dim=1), torch.full((256,), 0.5), atol=1e-5, rtol=0)
    assert torch.equal(texture[:8], texture[72:80])
    # any start at a cycle's beginning gives the same rows
    strength = torch.rand(1, 256, 40)
    assert torch.equal(grains.rows_of(strength)[:, :, 16:], grains.rows_of(strength[:, :, 16:]))


def test_the_vocoder_plays_the_grains_to_its_ends() -> None:
    vocoder = grains.grain_vocoder(VocoderConfig(initial_channels=224, resblock_kernels=(3,), dilations=((1,),)))
    rows = grains.rows_of(0.4 * torch.rand(2, 256, 48) ** 8)
    expected = grains.play_rows(rows).tanh()
    found = vocoder(rows)[:, 0, : expected.shape[1]]
    assert 0.2 < float(expected.abs().max()) < 0.9  # the second offset holds samples up to 2
    # float32 with offsets of 4 under sums of 217 terms; measured up to 2.9e-5, at both ends as in the middle
    assert float((found - expected).abs().max()) < 1e-4
    for name, parameter in vocoder.named_parameters():
        torch.testing.assert_close(parameter.half().float(), parameter, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "config", [VocoderConfig(initial_channels=192), VocoderConfig(initial_channels=224, rates=(6, 5, 2, 4, 2))]
)
def test_a_vocoder_of_another_shape_is_refused(config: VocoderConfig) -> None:
    with pytest.raises(ParamError, match=r"expected at least 218 channels and the released rates"):
        grains.grain_vocoder(config)
