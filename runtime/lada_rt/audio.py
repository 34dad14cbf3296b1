"""Audio in and out: any file libsndfile reads, any rate, any channel count, to float32 at the model's rate.

The released program decodes with FFmpeg and resamples with julius' windowed sinc; here soundfile and soxr do it
(the measured difference is in bench/results, see README "Differences").
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lada_rt.errors import AudioError, ParamError

__all__ = [
    "OUTPUT_FORMATS",
    "AudioInput",
    "LoadedAudio",
    "check_output_path",
    "load_audio",
    "mix_vocal",
    "to_pcm16",
    "wav_header",
    "write_audio",
]

log = logging.getLogger("lada_rt")
log.addHandler(logging.NullHandler())  # what an application does not ask for, it does not get

#: a path, or (samples [N] or [C, N] float, sample rate in Hz)
AudioInput = str | os.PathLike[str] | tuple[np.ndarray, int]

#: suffix -> (libsndfile format, subtype)
OUTPUT_FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_24"), ".ogg": ("OGG", "VORBIS")}

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
#: A file shorter than this is a mistake of the caller, not a song. Arrays are taken at any length.
MIN_FILE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class LoadedAudio:
    """Audio at the model's rate.

    Attributes:
        samples: [C, N] float32, one or two channels, finite.
        duration_s: of the segment in the source.
        warnings: what had to be mended, one line each.
    """

    samples: np.ndarray
    duration_s: float
    warnings: tuple[str, ...]


def load_audio(
    source: AudioInput,
    rate_hz: int,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_seconds: float = math.inf,
    what: str = "vocal",
) -> LoadedAudio:
    """Read a segment of a file or array and resample it (spec/lada_band e: resample first, channels second).

    Args:
        source: path, or (samples, rate).
        rate_hz: rate to return.
        start_s, end_s: the segment in seconds; end None is the end of the source.
        max_seconds: the longest segment allowed.
        what: name used in messages.

    Returns:
        One or two channels: mono stays mono, of more than two the first two are kept, as the released program does. NaN
        becomes 0 and infinities +-1 before resampling, which would spread them.

    Raises:
        AudioError: no such file, not audio, empty, too short or long, or the segment lies outside it.
        ParamError: the segment's bounds make no sense, or the array has a wrong type or shape.
    """
    _check_segment(start_s, end_s)
    if isinstance(source, tuple):
        samples, source_rate_hz = _slice_array(source, start_s, end_s, max_seconds, what)
    elif not isinstance(source, str | os.PathLike):
        raise ParamError(f"{what}: expected a path or (samples, sample rate), got {type(source).__name__}")
    else:
        samples, source_rate_hz = _read_file(source, start_s, end_s, max_seconds, what)
    warnings = []
    duration_s = samples.shape[1] / source_rate_hz
    if samples.shape[0] > 2:
        warnings.append(f"{what}: {samples.shape[0]} channels, only the first two are used")
        samples = samples[:2]
    n_bad = samples.size - int(np.count_nonzero(np.isfinite(samples)))
    if n_bad:
        warnings.append(f"{what}: {n_bad} samples were NaN or infinite and have been replaced by 0 or full scale")
        samples = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0)
    for line in warnings:
        log.warning(line)
    return LoadedAudio(_resample(samples, source_rate_hz, rate_hz), duration_s, tuple(warnings))


def _check_segment(start_s: Any, end_s: Any) -> None:
    for name, value in (("start", start_s), ("end", end_s)):
        if value is None and name == "end":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ParamError(f"{name}: expected seconds from 0, got {value!r}")
    if end_s is not None and end_s <= start_s:
        raise ParamError(f"end: expected more than start ({start_s:g} s), got {end_s:g} s")


def _segment_frames(
    n_frames: int, rate_hz: int, start_s: float, end_s: float | None, max_seconds: float, what: str
) -> tuple[int, int]:
    if n_frames == 0:
        raise AudioError(f"{what}: expected audio, got zero samples; give a file that holds sound")
    start = int(rate_hz * start_s)
    if start >= n_frames:
        raise AudioError(
            f"{what}: --start {start_s:g} s lies past the end ({n_frames / rate_hz:.2f} s); give an earlier start"
        )
    stop = n_frames if end_s is None else min(n_frames, int(rate_hz * end_s))
    if stop <= start:
        raise AudioError(f"{what}: the segment from {start_s:g} s to {end_s} s holds no sample; make it longer")
    if (stop - start) / rate_hz > max_seconds:
        raise AudioError(
            f"{what}: expected at most {max_seconds:g} s, got {(stop - start) / rate_hz:.1f} s; "
            "cut it with --start and --end, or build a bundle with a larger --max-seconds"
        )
    return start, stop


def _read_file(
    path: str | os.PathLike[str], start_s: float, end_s: float | None, max_seconds: float, what: str
) -> tuple[np.ndarray, int]:
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{what}: {path}: no such file; give a WAV, FLAC, OGG or MP3 file")
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames / file.samplerate < MIN_FILE_SECONDS and file.frames > 0:
                raise AudioError(
                    f"{what}: {path}: expected at least {MIN_FILE_SECONDS:g} s of audio, got "
                    f"{file.frames / file.samplerate:.3f} s; "
                    "give a longer file"
                )
            start, stop = _segment_frames(file.frames, file.samplerate, start_s, end_s, max_seconds, f"{what}: {path}")
            file.seek(start)
            samples = file.read(stop - start, dtype="float32", always_2d=True)
            rate_hz = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        detail = " ".join(str(error).split()).rstrip(".")
        raise AudioError(
            f"{what}: {path}: expected a WAV, FLAC, OGG or MP3 file, cannot read it ({detail[-120:]})"
        ) from None
    if len(samples) == 0:
        raise AudioError(f"{what}: {path}: expected {stop - start} samples, got none; the file is truncated")
    return np.ascontiguousarray(samples.T), rate_hz


def _slice_array(
    source: tuple[np.ndarray, int], start_s: float, end_s: float | None, max_seconds: float, what: str
) -> tuple[np.ndarray, int]:
    if len(source) != 2:
        raise ParamError(f"{what}: expected (samples, sample rate), got a tuple of {len(source)}")
    samples, rate_hz = source
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f" or samples.ndim not in (1, 2):
        got = f"{samples.dtype} {list(samples.shape)}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ParamError(f"{what}: expected a float array [N] or [C, N], got {got}")
    if (
        isinstance(rate_hz, bool)
        or not isinstance(rate_hz, int | np.integer)
        or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ
    ):
        raise ParamError(f"{what}: expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {rate_hz!r}")
    samples = np.atleast_2d(samples)
    if not 1 <= samples.shape[0] <= 64:
        raise ParamError(
            f"{what}: expected 1 to 64 channels in [C, N], got shape {list(samples.shape)}; transpose [N, C] arrays"
        )
    start, stop = _segment_frames(samples.shape[1], int(rate_hz), start_s, end_s, max_seconds, what)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(samples[:, start:stop], dtype=np.float32), int(rate_hz)


def _resample(samples: np.ndarray, rate_in_hz: int, rate_out_hz: int) -> np.ndarray:
    if rate_in_hz == rate_out_hz:
        return samples
    import soxr

    out = soxr.resample(samples.T, rate_in_hz, rate_out_hz, quality="VHQ").T
    # floor, as the released resampler: the number of codes follows from it
    n_out = max(1, samples.shape[1] * rate_out_hz // rate_in_hz)
    if out.shape[1] < n_out:
        out = np.pad(out, ((0, 0), (0, n_out - out.shape[1])))
    return np.ascontiguousarray(out[:, :n_out], dtype=np.float32)


def mix_vocal(accompaniment: np.ndarray, vocal: np.ndarray) -> np.ndarray:
    """Accompaniment plus the vocal's channel mean at unity gain, cut to the shorter (spec/lada_band e).

    Args:
        accompaniment: [2, N] float32.
        vocal: [C, M] float32 at the same rate.

    Returns:
        [2, min(N, M)] float32, not limited.
    """
    n = min(accompaniment.shape[1], vocal.shape[1])
    return accompaniment[:, :n] + vocal[:, :n].mean(axis=0, dtype=np.float32)


def check_output_path(path: Path, vocal: AudioInput) -> None:
    """Refuse an output that cannot be written before any work is done.

    Raises:
        ParamError: unknown suffix, no such folder, not writable, or the output is the input.
    """
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise ParamError(
            f"output: expected a name ending in {', '.join(OUTPUT_FORMATS)}, or - for WAV on stdout, got {path}"
        )
    if not path.parent.is_dir():
        raise ParamError(f"output: {path.parent}: no such folder; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ParamError(f"output: {path}: cannot be written; choose another place")
    if not isinstance(vocal, tuple) and path.exists() and Path(vocal).exists() and path.samefile(vocal):
        raise ParamError(f"output: {path} is the input itself; choose another name")


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes its place, on any failure it is removed.

    Raises:
        ParamError: the file system refuses the write (no space, no permission).
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise ParamError(f"output: {path}: cannot be written ({error.strerror}); choose another place") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise ParamError(
            f"output: {path}: cannot be written ({error.strerror or error}); free some space or choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_audio(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    """Write [C, N] float32 as the file type of `path`'s suffix; a failure leaves no file behind.

    Raises:
        ParamError: unknown suffix, or the file cannot be written.
    """
    import soundfile

    container, subtype = OUTPUT_FORMATS[path.suffix.lower()]
    with replaced_file(path) as temporary:
        try:
            with soundfile.SoundFile(temporary, "w", rate_hz, samples.shape[0], subtype, format=container) as file:
                for start in range(0, samples.shape[1], rate_hz * 10):
                    block = samples[:, start : start + rate_hz * 10]
                    file.write(to_pcm16(block) if subtype == "PCM_16" else np.clip(block.T, -1.0, 1.0))
            _check_complete(temporary, samples.shape[1])
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise ParamError(
                f"output: {path}: cannot be written ({_one_line(error)}); free some space or choose another place"
            ) from None


def _check_complete(path: Path, n_samples: int) -> None:
    """libsndfile does not report a full disk when it flushes on close, so count what arrived."""
    import soundfile

    found = soundfile.info(path).frames
    if found != n_samples:
        raise OSError(28, f"only {found} of {n_samples} samples could be written")


def wav_header(n_samples: int, rate_hz: int, n_channels: int = 2) -> bytes:
    """Header of a 16-bit PCM WAV of known length, for a stream that cannot be rewound."""
    n_bytes = n_samples * n_channels * 2
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + n_bytes, b"WAVE", b"fmt ", 16),
        *(1, n_channels, rate_hz, rate_hz * n_channels * 2, n_channels * 2, 16),
        *(b"data", n_bytes),
    )


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """[C, N] float32 to interleaved [N, C] 16-bit PCM, rounded to nearest and clipped.

    libsndfile's own conversion rounds down, half a step of offset.
    """
    return np.clip(np.rint(samples.T * np.float32(32767)), -32768, 32767).astype("<i2")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
