"""What strangers upload: files cut short, on another scale, far too long."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lada_rt import AudioError, GenerationCancelled, GenerationParams, Progress
from lada_rt.audio import AudioInput, load_audio
from lada_rt.pipeline import Pipeline
from stubs import StubReference, no_threads_left, stub_pipeline, sung

RATE_HZ = 48_000
FAST = GenerationParams(steps=3, flow_steps=2)
VOCAL = (sung(RATE_HZ), RATE_HZ)
TRUNCATED = "vocal: expected {} s, as the header says, got {} s; the file is truncated"


class Heard:
    """A reference encoder that keeps what it is given, and may wait in its calls."""

    def __init__(self) -> None:
        self.calls: list[np.ndarray] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append(inputs["waveform"][0].copy())
        self.entered.set()
        assert self.gate.wait(20)
        return StubReference().run(**inputs)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    """Takes 4 s, of a reference too, in chunks of 1 s."""
    pipe = stub_pipeline(tmp_path, max_seconds=4, ref_chunk_samples=RATE_HZ)
    pipe._engines["ref_encoder"] = Heard()
    return pipe


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("start_s", [0, 1.5])
def test_the_first_of_a_long_reference_is_used(
    pipe: Pipeline, tmp_path: Path, start_s: float, as_file: bool, long: bool
) -> None:
    album = sung(RATE_HZ * 9, seed=3)
    reference: AudioInput = (album, RATE_HZ)
    if as_file:
        reference = tmp_path / "album.wav"
        soundfile.write(reference, album, RATE_HZ, subtype="FLOAT")
    result = pipe.generate(VOCAL, reference=reference, reference_start_s=start_s, long=long, params=FAST)
    assert result.warnings == (
        f"reference: expected at most 4 s, got {9 - start_s:.1f} s; the first are used, choose others with "
        "reference_start_s (--reference-start)",
    )
    first = int(start_s * RATE_HZ)
    part = (album[first : first + 4 * RATE_HZ], RATE_HZ)
    alone = pipe.generate(VOCAL, reference=part, params=FAST)
    assert alone.warnings == ()
    np.testing.assert_array_equal(result.audio, alone.audio)
    calls = pipe._engines["ref_encoder"].calls
    assert [len(call) for call in calls] == [RATE_HZ] * 8


def test_a_closed_stream_encodes_no_further_chunk_of_its_reference(pipe: Pipeline) -> None:
    encoder = pipe._engines["ref_encoder"]
    encoder.gate.clear()
    stream = pipe.stream(VOCAL, reference=(sung(RATE_HZ * 4), RATE_HZ), params=FAST)
    with ThreadPoolExecutor(1) as other:
        chunk = other.submit(next, stream)
        assert encoder.entered.wait(20)
        stream.close()
        encoder.gate.set()
        with pytest.raises(GenerationCancelled):
            chunk.result(20)
    assert len(encoder.calls) == 1
    assert no_threads_left()


def test_a_callback_stops_between_chunks_of_the_reference(pipe: Pipeline) -> None:
    encoder = pipe._engines["ref_encoder"]

    def go_on(progress: Progress) -> bool:
        return len(encoder.calls) < 2

    with pytest.raises(GenerationCancelled):
        pipe.generate(VOCAL, reference=(sung(RATE_HZ * 4), RATE_HZ), params=FAST, on_progress=go_on)
    assert len(encoder.calls) == 2


@pytest.mark.parametrize("which", ["vocal", "reference"])
def test_reading_can_be_stopped(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """By `close`, block by block."""
    monkeypatch.setattr("lada_rt.audio.BLOCK_FRAMES", 1000)
    blocks: list[int] = []

    class Closing(np.ndarray):
        """Samples that close the stream when their third block is taken."""

        def __getitem__(self, key: Any) -> Any:
            blocks.append(1)
            if len(blocks) == 3:
                stream._run.cancel()
            return np.asarray(self)[key]

    samples = sung(RATE_HZ * 3)[None].view(Closing)
    inputs: dict[str, Any] = {"vocal": VOCAL, which: (samples, RATE_HZ)}
    stream = pipe.stream(**inputs, params=FAST)
    with pytest.raises(GenerationCancelled):
        next(stream)
    assert len(blocks) == 3
    assert no_threads_left()


def cut(path: Path, fraction: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def test_half_an_mp3_is_told(tmp_path: Path) -> None:
    path = tmp_path / "v.mp3"
    soundfile.write(path, sung(RATE_HZ * 2), RATE_HZ)
    assert load_audio(path, RATE_HZ).warnings == ()
    loaded = load_audio(cut(path, 0.5), RATE_HZ)
    assert loaded.warnings == (TRUNCATED.format("2.00", f"{loaded.duration_s:.2f}"),)
    assert 0.5 < loaded.duration_s < 1.5
    assert load_audio(path, RATE_HZ, end_s=0.5).warnings == ()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM"])
def test_half_a_wav_is_told(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "v.wav"
    soundfile.write(path, sung(RATE_HZ * 4), RATE_HZ, subtype=subtype)
    assert load_audio(path, RATE_HZ).warnings == ()
    cut(path, 0.5)
    (warning,) = load_audio(path, RATE_HZ).warnings
    assert warning.startswith("vocal: expected 4.0")
    assert " got 2.0" in warning
    # of the part that was asked for
    assert load_audio(path, RATE_HZ, end_s=1.5).warnings == ()
    (warning,) = load_audio(path, RATE_HZ, start_s=1, end_s=3).warnings
    assert warning.startswith("vocal: expected 2.00 s")
    assert " got 1.0" in warning


def with_data_size(path: Path, n_bytes: int, before: bytes = b"") -> Path:
    """A WAV of 1 s whose data chunk states a length of its own, after other chunks."""
    soundfile.write(path, sung(RATE_HZ), RATE_HZ)
    data = path.read_bytes()
    at = data.index(b"data")
    path.write_bytes(data[:at] + before + b"data" + n_bytes.to_bytes(4, "little") + data[at + 8 :])
    return path


@pytest.mark.parametrize("n_bytes", [2**32 - 1, 2**32 - 37, 2**31 - 1, 2**31, 0x7FFFF000, 2 * RATE_HZ, 2 * RATE_HZ + 2])
def test_a_wav_from_a_pipe_does_not_know_its_length(tmp_path: Path, n_bytes: int) -> None:
    loaded = load_audio(with_data_size(tmp_path / "v.wav", n_bytes), RATE_HZ)
    assert loaded.samples.shape == (1, RATE_HZ)
    assert loaded.warnings == ()


def test_the_data_chunk_is_found_behind_others(tmp_path: Path) -> None:
    odd = b"note" + (3).to_bytes(4, "little") + b"hi!\0"
    loaded = load_audio(with_data_size(tmp_path / "v.wav", 4 * RATE_HZ, odd * 5), RATE_HZ)
    assert loaded.warnings == (TRUNCATED.format("2.00", "1.00"),)


def test_no_room_is_made_for_what_a_header_claims(tmp_path: Path) -> None:
    loaded = load_audio(with_data_size(tmp_path / "v.wav", 10**9), RATE_HZ, max_seconds=2)
    assert loaded.samples.shape == (1, RATE_HZ)
    assert loaded.warnings == (TRUNCATED.format("10416.67", "1.00"),)


@pytest.mark.parametrize("mono", [False, True])
@pytest.mark.parametrize("rate_hz", [44_100, RATE_HZ])
@pytest.mark.parametrize("level", [3.4e38, 1e30, 2.0**33])
def test_samples_beyond_any_scale_stay_finite(tmp_path: Path, level: float, rate_hz: int, mono: bool) -> None:
    noise = np.random.default_rng(0).choice([-level, level], (rate_hz, 2)).astype(np.float32)
    path = tmp_path / "v.wav"
    soundfile.write(path, noise, rate_hz, subtype="FLOAT")
    loaded = load_audio(path, RATE_HZ, mono=mono)
    assert np.isfinite(loaded.samples).all()
    assert np.abs(loaded.samples).max() < 10
    assert loaded.warnings == (
        f"vocal: {noise.size} samples were NaN, infinite or beyond any scale, replaced by 0 or full scale",
    )


@pytest.mark.parametrize(
    ("peak", "told"), [(1.0, None), (1.99, None), (11810, "11810"), (2.5, "2.5"), (2.0**31, "2.1475e+09")]
)
def test_another_scale_is_told(peak: float, told: str | None) -> None:
    samples = (sung(44_100) / np.abs(sung(44_100)).max() * np.float32(peak)).astype(np.float32)
    loaded = load_audio((samples, 44_100), RATE_HZ)
    assert np.isfinite(loaded.samples).all()
    expected = () if told is None else (f"vocal: expected samples within +-1, got a peak of {told}; scale them to +-1",)
    assert loaded.warnings == expected


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_seconds": 0.5}, "cut it with start_s and end_s (--start, --end), or take it whole with long (--long)"),
        ({"start_s": 2}, "give an earlier start_s (--start)"),
        ({"start_s": 2, "what": "reference"}, "give an earlier reference_start_s (--reference-start)"),
    ],
)
def test_remedies_serve_programs_and_the_command_line(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(AudioError) as caught:
        load_audio(VOCAL, RATE_HZ, **options)
    assert str(caught.value).endswith(f"; {remedy}")
