"""Reading, resampling and writing audio; every mistake a user makes with a file."""

from __future__ import annotations

import errno
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from lada_rt.audio import (
    AudioWriter,
    check_output_path,
    load_audio,
    mix_vocal,
    to_pcm16,
    wav_header,
    write_audio,
)
from lada_rt.errors import AudioError, ParamError
from lada_rt.files import check_target
from stubs import sung


def write(path: Path, samples: np.ndarray, rate_hz: int = 48_000, **options: str) -> Path:
    soundfile.write(path, samples, rate_hz, **options)
    return path


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.1), (".mp3", 0.1)])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_every_format(tmp_path: Path, suffix: str, tolerance: float, channels: int) -> None:
    tone = np.repeat(sung(48_000)[:, None], channels, axis=1)
    loaded = load_audio(write(tmp_path / f"v{suffix}", tone), 48_000)
    assert loaded.samples.shape == (channels, 48_000)
    assert loaded.samples.dtype == np.float32
    np.testing.assert_allclose(loaded.samples, tone.T, atol=tolerance)
    assert loaded.warnings == ()


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 88_200, 96_000, 192_000])
def test_resamples_any_rate_to_the_floor_length(rate_hz: int) -> None:
    """The length is the released resampler's, floor(N * out / in); a tone keeps pitch and level."""
    n = rate_hz + 17
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(n) / rate_hz)
    loaded = load_audio((tone.astype(np.float32), rate_hz), 48_000)
    assert loaded.samples.shape == (1, n * 48_000 // rate_hz)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(loaded.samples.shape[1]) / 48_000)
    np.testing.assert_allclose(loaded.samples[0, 2000:-2000], expected[2000:-2000], atol=1e-3)


def test_more_than_two_channels_are_cut_with_a_warning(tmp_path: Path) -> None:
    surround = np.stack([sung(48_000, seed=i) for i in range(6)], axis=1)
    loaded = load_audio(write(tmp_path / "v.wav", surround, subtype="FLOAT"), 48_000)
    np.testing.assert_array_equal(loaded.samples, surround.T[:2])
    assert "6 channels" in loaded.warnings[0]


def test_bad_samples_are_cleaned_before_resampling(tmp_path: Path) -> None:
    broken = sung(44_100)
    broken[1000], broken[2000], broken[3000] = np.nan, np.inf, -np.inf
    loaded = load_audio(write(tmp_path / "v.wav", broken, 44_100, subtype="FLOAT"), 48_000)
    assert np.isfinite(loaded.samples).all()
    assert "3 samples" in loaded.warnings[0]


def test_segment(tmp_path: Path) -> None:
    tone = sung(48_000 * 3)
    path = write(tmp_path / "v.wav", tone, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, 48_000, start_s=1, end_s=2.5).samples[0], tone[48_000:120_000])
    np.testing.assert_array_equal(load_audio(path, 48_000, start_s=2).samples[0], tone[96_000:])
    assert load_audio(path, 48_000, end_s=99).samples.shape == (1, 48_000 * 3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"start_s": 4.0}, AudioError, "past the end"),
        ({"start_s": 2.0, "end_s": 1.0}, ParamError, "end"),
        ({"start_s": 1.0, "end_s": 1.0}, ParamError, "end"),
        ({"start_s": -1.0}, ParamError, "start"),
        ({"start_s": float("nan")}, ParamError, "start"),
        ({"end_s": float("inf")}, ParamError, "end"),
        ({"start_s": "1"}, ParamError, "start"),
        ({"start_s": 1e305}, ParamError, "start"),
        ({"end_s": 10**400}, ParamError, "end"),
        ({"max_seconds": 2.0}, AudioError, "at most 2 s"),
        ({"start_s": 2.9999999, "end_s": 2.99999995}, AudioError, "no sample"),
    ],
)
def test_bad_segments(tmp_path: Path, options: dict, error: type[Exception], words: str) -> None:
    path = write(tmp_path / "v.wav", sung(48_000 * 3))
    with pytest.raises(error, match=words) as caught:
        load_audio(path, 48_000, **options)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("this is not audio\n" * 50)
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    zero = write(tmp_path / "zero.wav", np.zeros((0, 1)))
    short = write(tmp_path / "short.wav", sung(2400))
    truncated = tmp_path / "truncated.flac"
    truncated.write_bytes(write(tmp_path / "whole.flac", sung(48_000)).read_bytes()[:60])
    for path, words in [
        (tmp_path / "missing.wav", "no such file"),
        (tmp_path, "no such file"),
        (text, "cannot read it"),
        (empty, "cannot read it"),
        (zero, "zero samples"),
        (short, "at least 0.1 s"),
        (truncated, "cannot read it|truncated"),
        (write(tmp_path / "bare.raw", sung(4800), subtype="PCM_16"), "cannot read it"),
        (write(tmp_path / "slow.wav", sung(480), 999), "sample rate from 1000"),
        (tmp_path / ("long" * 100), "no such file"),
        (tmp_path / "a\0b.wav", "no such file"),
    ]:
        with pytest.raises(AudioError, match=words) as caught:
            load_audio(path, 48_000)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 5e-5), (".flac", 1e-6), (".ogg", 0.1)])
def test_write_round_trip(tmp_path: Path, suffix: str, tolerance: float) -> None:
    stereo = np.stack([sung(60_000), sung(60_000, seed=1)])
    path = tmp_path / f"out{suffix}"
    write_audio(path, stereo, 48_000)
    samples, rate_hz = soundfile.read(path)
    assert rate_hz == 48_000
    np.testing.assert_allclose(samples.T, stereo, atol=tolerance)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    for suffix in (".wav", ".flac"):
        path = Path(os.fsdecode(odd + suffix.encode()))
        try:
            path.touch()
        except OSError as error:
            pytest.skip(f"this file system takes UTF-8 alone: {error}")
        write_audio(path, np.zeros((2, 4800), np.float32), 48_000)
        assert load_audio(path, 48_000).samples.shape == (2, 4800)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_writers_side_by_side_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: write_audio(tmp_path / f"{i}.wav", np.zeros((2, 10)), 48_000), range(64)))
    finally:
        after = os.umask(before)
    assert after == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    assert len(list(tmp_path.iterdir())) == 64


def test_a_full_disk_behind_stdout_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        buffer = FullDisk(None)

    monkeypatch.setattr(sys, "stdout", Stdout)
    with pytest.raises(ParamError, match="output: stdout: cannot be written"):
        AudioWriter(None, 48_000).begin(10)


def test_write_clips_instead_of_wrapping(tmp_path: Path) -> None:
    write_audio(tmp_path / "o.wav", np.array([[2.0, -2.0], [0.5, -0.5]], np.float32), 48_000)
    samples, _ = soundfile.read(tmp_path / "o.wav")
    np.testing.assert_allclose(samples.T, [[1, -1], [0.5, -0.5]], atol=1e-4)


class FullDisk:
    """A file whose writes fail as on a full file system."""

    def __init__(self, real: object) -> None:
        self._real = real

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self._real.close()

    def write(self, data: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "out.flac"
    kept.write_bytes(b"the old one")
    real = soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda *args, **kw: FullDisk(real(*args, **kw)))
    with pytest.raises(ParamError, match="No space left"):
        write_audio(kept, np.zeros((2, 100), np.float32), 48_000)
    assert kept.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["out.flac"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this platform has no /dev/full")
@pytest.mark.parametrize("n_samples", [100, 1_000_000])
def test_full_disk_under_a_wav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_samples: int) -> None:
    """Whether the write itself fails or only the flush of what was buffered."""
    kept = tmp_path / "out.wav"
    kept.write_bytes(b"the old one")
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": real(Path("/dev/full") if mode == "wb" else self, mode))
    with pytest.raises(ParamError, match="No space left"):
        write_audio(kept, np.zeros((2, n_samples), np.float32), 48_000)
    assert kept.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["out.wav"]


def test_wav_beyond_4_gib_is_refused() -> None:
    wav_header(2**30 - 64, 48_000)
    with pytest.raises(ParamError, match="4 GiB"):
        wav_header(2**30, 48_000)


@pytest.mark.parametrize("rate_hz", [44_100, 96_000])
def test_reading_in_blocks_equals_reading_at_once(
    tmp_path: Path, rate_hz: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stereo = np.stack([sung(rate_hz * 3), sung(rate_hz * 3, seed=1)], axis=1)
    path = write(tmp_path / "v.wav", stereo, rate_hz, subtype="FLOAT")
    whole = soxr.resample(stereo, rate_hz, 48_000, quality="VHQ").T
    for block in (1 << 18, 10_007):
        monkeypatch.setattr("lada_rt.audio.BLOCK_FRAMES", block)
        for source in (path, (stereo.T, rate_hz)):
            np.testing.assert_allclose(load_audio(source, 48_000).samples, whole, atol=1e-6)


def test_truncated_file_keeps_what_is_there(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.flac", sung(48_000 * 20))
    data = whole.read_bytes()
    cut = tmp_path / "cut.flac"
    cut.write_bytes(data[: len(data) // 2])
    try:
        loaded = load_audio(cut, 48_000)
    except AudioError:
        return  # some builds of libsndfile refuse the file
    assert 0 < loaded.samples.shape[1] < 48_000 * 20
    assert loaded.duration_s == pytest.approx(loaded.samples.shape[1] / 48_000)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("rate_hz", [48_000, 44_100])
def test_mono_is_the_mean_of_all_channels(tmp_path: Path, as_file: bool, rate_hz: int) -> None:
    """A reference (spec/clamp3 3.1): of six channels each counts for a sixth, the one with sound too."""
    surround = np.zeros((6, rate_hz), np.float32)
    surround[3] = sung(rate_hz)
    surround[0, 5] = np.nan
    path = tmp_path / "v.wav"
    source = write(path, surround.T, rate_hz, subtype="FLOAT") if as_file else (surround, rate_hz)
    loaded = load_audio(source, 48_000, what="reference", mono=True)
    alone = load_audio((sung(rate_hz), rate_hz), 48_000)
    assert loaded.samples.shape == (1, 48_000)
    np.testing.assert_allclose(loaded.samples, alone.samples / 6, atol=1e-6)
    (warning,) = loaded.warnings
    assert warning.startswith("reference: 1 samples were NaN, infinite or beyond any scale, replaced by 0")


def with_length(path: Path, data: bytes, n_frames: int) -> Path:
    """A FLAC whose header states another length (STREAMINFO: the low half of byte 21, and bytes 22 to 25)."""
    header = bytearray(data)
    header[21] = (header[21] & 0xF0) | n_frames >> 32
    header[22:26] = (n_frames & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(header)
    return path


@pytest.mark.parametrize("max_seconds", [10.0, np.inf])
def test_headers_without_a_length_or_with_a_wild_one(tmp_path: Path, max_seconds: float) -> None:
    """An encoder that writes to a pipe cannot fill in the length; room must not be made for what a header claims."""
    data = write(tmp_path / "v.flac", sung(48_000)).read_bytes()
    loaded = load_audio(with_length(tmp_path / "same.flac", data, 48_000), 48_000)
    assert loaded.samples.shape == (1, 48_000)
    for n_frames, words in [(0, "states its length, got one that was written to a pipe"), (2**36 - 1, "at most 24 h")]:
        with pytest.raises(AudioError, match=words):
            load_audio(with_length(tmp_path / "odd.flac", data, n_frames), 48_000, max_seconds=max_seconds)


def test_check_output_path(tmp_path: Path) -> None:
    vocal = write(tmp_path / "vocal.wav", sung(4800))
    check_output_path(tmp_path / "out.WAV", vocal)
    for path, words in [
        (tmp_path / "out.mp3", "ending in"),
        (tmp_path / "out", "ending in"),
        (tmp_path / "nowhere" / "out.wav", "no such folder"),
        (vocal, "is an input"),
    ]:
        with pytest.raises(ParamError, match=words):
            check_output_path(path, vocal)
    report = tmp_path / "report.json"
    report.symlink_to(tmp_path / "nothing")
    for path, words in [
        (vocal, "is an input"),
        (tmp_path, "cannot be written"),
        (report, "cannot be written"),
        (Path("/dev/null"), "cannot be written"),
        (tmp_path / ("long" * 100) / "report.json", "no such folder"),
    ]:
        with pytest.raises(ParamError, match=f"--json: .*{words}"):
            check_target(path, "--json", vocal)


def test_wav_stream_has_a_true_header() -> None:
    stereo = np.stack([sung(1000), sung(1000, seed=1)])
    samples, rate_hz = soundfile.read(io.BytesIO(wav_header(1000, 48_000) + to_pcm16(stereo).tobytes()))
    assert rate_hz == 48_000
    np.testing.assert_allclose(samples.T, stereo, atol=5e-5)


def test_stdout_stream_equals_the_file(tmp_path: Path) -> None:
    """-o - and -o out.wav carry the same samples."""
    stereo = np.stack([sung(5000), sung(5000, seed=1)]) * 3
    write_audio(tmp_path / "o.wav", stereo, 48_000)
    from_file, _ = soundfile.read(tmp_path / "o.wav", dtype="int16")
    np.testing.assert_array_equal(to_pcm16(stereo), from_file)


def test_mix_vocal() -> None:
    accompaniment = np.full((2, 10), 0.25, np.float32)
    vocal = np.stack([np.full(8, 0.5, np.float32), np.zeros(8, np.float32)])
    np.testing.assert_array_equal(mix_vocal(accompaniment, vocal), np.full((2, 8), 0.5, np.float32))
