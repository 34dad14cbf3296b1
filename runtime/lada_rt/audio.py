"""Audio in and out: any file libsndfile reads, any rate, any channel count, to float32 at the model's rate.

The released program decodes with FFmpeg and resamples with julius' windowed sinc; here soundfile and soxr do it
(the measured difference is in bench/results, see README "Differences").
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lada_rt.errors import AudioError, ParamError
from lada_rt.files import check_source, check_target
from lada_rt.params import check_seconds
from lada_rt.wav import announced_frames, to_pcm16, wav_header

__all__ = [
    "OUTPUT_FORMATS",
    "AudioInput",
    "AudioWriter",
    "LoadedAudio",
    "check_output_path",
    "load_audio",
    "mix_vocal",
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
#: Nobody sings for longer: the header of such a file is damaged, and room is made for what it promises.
MAX_FILE_HOURS = 24
#: libsndfile counts 2^63 - 1 frames where FLAC has no length in its header, and fails on the read that meets the end
_UNKNOWN_FRAMES = 1 << 62
#: frames read, mended and resampled at once, so that no second copy of a long vocal exists
BLOCK_FRAMES = 1 << 18
#: No integer format reaches this; what does is no sound, and from there sums and resampling could overflow to infinity.
MAX_LEVEL = 2.0**32
#: 6 dB over full scale: decoded MP3 and unlimited mixes stay below, samples on the scale of integers do not
LOUD_PEAK = 2.0


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
    cut: bool = False,
    what: str = "vocal",
    mono: bool = False,
    check: Callable[[], None] = lambda: None,
) -> LoadedAudio:
    """Read a segment of a file or array and resample it (spec/lada_band e: resample first, channels second).

    Args:
        source: path, or (samples, rate).
        rate_hz: rate to return.
        start_s, end_s: the segment in seconds; end None is the end of the source.
        max_seconds: the longest segment allowed.
        cut: keep the beginning of a longer one, with a warning, rather than refuse it.
        what: name used in messages.
        mono: average all channels (spec/clamp3 3.1); of linear steps the order does not matter.
        check: called before every block; raises to stop.

    Returns:
        One or two channels: mono stays mono, of more than two the first two are kept, as the released program does with
        a vocal. NaN becomes 0, and infinities and what lies beyond any scale +-1, before resampling would spread them.

    Raises:
        AudioError: no such file, not audio, its length unknown, empty, too short or long, or the segment lies outside.
        ParamError: the segment's bounds make no sense, or the array has a wrong type or shape.
    """
    _check_segment(start_s, end_s)
    wanted = _Wanted(start_s, end_s, max_seconds, cut, what)
    with contextlib.ExitStack() as files:
        if isinstance(source, tuple):
            segment = _open_array(source, wanted)
        elif not isinstance(source, str | os.PathLike):
            raise ParamError(f"{what}: expected a path or (samples, sample rate), got {type(source).__name__}")
        else:
            segment = _open_file(files, source, wanted)
        samples, n_frames, n_bad, peak = _collect(segment, rate_hz, mono, check)
    if n_frames == 0:
        raise AudioError(f"{what}: {source}: expected {segment.n_frames} samples, got none; the file is truncated")
    source_hz, warnings = segment.rate_hz, []
    if segment.n_uncut > segment.n_frames:
        warnings.append(
            f"{what}: expected at most {max_seconds:g} s, got {segment.n_uncut / source_hz:.1f} s; the first are used, "
            f"choose others with {wanted.start_option}"
        )
    if segment.n_announced - n_frames > MIN_FILE_SECONDS * source_hz:  # less is no loss: headers count padding too
        warnings.append(
            f"{what}: expected {segment.n_announced / source_hz:.2f} s, as the header says, got "
            f"{n_frames / source_hz:.2f} s; the file is truncated"
        )
    if segment.n_channels > 2 and not mono:
        warnings.append(f"{what}: {segment.n_channels} channels, only the first two are used")
    if n_bad:
        warnings.append(f"{what}: {n_bad} samples were NaN, infinite or beyond any scale, replaced by 0 or full scale")
    if peak > LOUD_PEAK:
        warnings.append(f"{what}: expected samples within +-1, got a peak of {peak:.5g}; scale them to +-1")
    for line in warnings:
        log.warning(line)
    return LoadedAudio(samples, n_frames / source_hz, tuple(warnings))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What `load_audio` is asked for."""

    start_s: float
    end_s: float | None
    max_seconds: float
    cut: bool
    what: str

    @property
    def start_option(self) -> str:
        # a reference starts where the vocal does, unless told otherwise
        return "reference_start_s (--reference-start)" if self.what == "reference" else "start_s (--start)"

    def stop(self, n_frames: int, rate_hz: int) -> int:
        return n_frames if self.end_s is None else min(n_frames, int(rate_hz * self.end_s))


@dataclass(frozen=True, slots=True)
class _Segment:
    """A stretch of a source; blocks are [n, channels] float32."""

    rate_hz: int
    n_channels: int
    n_frames: int
    n_uncut: int  # without a bound on its length
    n_announced: int  # by the header of the file
    blocks: Iterator[np.ndarray]


def _collect(
    segment: _Segment, rate_hz: int, mono: bool, check: Callable[[], None]
) -> tuple[np.ndarray, int, int, float]:
    """Mend and resample a segment block by block: (samples [1 or 2, N], frames read, bad samples, peak)."""
    import soxr

    n_used = segment.n_channels if mono else min(segment.n_channels, 2)
    n_channels = 1 if mono else n_used
    resampler = None
    if segment.rate_hz != rate_hz:
        resampler = soxr.ResampleStream(segment.rate_hz, rate_hz, n_channels, dtype="float32", quality="VHQ")
    # floor, as the released resampler: the number of codes follows from it
    samples = np.zeros((n_channels, max(1, segment.n_frames * rate_hz // segment.rate_hz)), np.float32)
    n_read = n_bad = filled = 0
    peak = 0.0

    def keep(block: np.ndarray, last: bool) -> None:
        nonlocal filled
        piece = block if resampler is None else resampler.resample_chunk(block, last=last)
        piece = piece[: samples.shape[1] - filled]
        samples[:, filled : filled + len(piece)] = piece.T
        filled += len(piece)

    for block in segment.blocks:
        check()
        block = np.ascontiguousarray(block[:, :n_used])
        level = np.abs(block)
        bad = ~(level <= MAX_LEVEL)  # NaN too
        if bad.any():
            n_bad += int(np.count_nonzero(bad))
            block[bad] = np.clip(np.nan_to_num(block[bad]), -1.0, 1.0)
        peak = max(peak, float(level.max(where=~bad, initial=0.0)))
        n_read += len(block)
        keep(block.mean(axis=1, dtype=np.float32, keepdims=True) if mono else block, last=False)
    if resampler is not None:
        keep(np.zeros((0, n_channels), np.float32), last=True)
    n_out = max(1, n_read * rate_hz // segment.rate_hz)  # less than foreseen when the file is truncated
    return (samples if n_out == samples.shape[1] else samples[:, :n_out].copy()), n_read, n_bad, peak


def _check_segment(start_s: Any, end_s: Any) -> None:
    for name, value in (("start", start_s), ("end", end_s)):
        if value is None and name == "end":
            continue
        check_seconds(name, value)
    if end_s is not None and end_s <= start_s:
        raise ParamError(f"end: expected more than start ({start_s:g} s), got {end_s:g} s")


def _segment_frames(n_frames: int, rate_hz: int, wanted: _Wanted, what: str) -> tuple[int, int, int]:
    """Where the segment starts, where it stops, and where it would without a bound on its length."""
    if n_frames == 0:
        raise AudioError(f"{what}: expected audio, got zero samples; give a file that holds sound")
    start = int(rate_hz * wanted.start_s)
    if start >= n_frames:
        raise AudioError(
            f"{what}: the start, {wanted.start_s:g} s, lies past the end ({n_frames / rate_hz:.2f} s); "
            f"give an earlier {wanted.start_option}"
        )
    stop = wanted.stop(n_frames, rate_hz)
    if stop <= start:
        raise AudioError(
            f"{what}: the segment from {wanted.start_s:g} s to {wanted.end_s} s holds no sample; make it longer"
        )
    if (stop - start) / rate_hz <= wanted.max_seconds:
        return start, stop, stop
    if wanted.cut:
        return start, start + int(wanted.max_seconds * rate_hz), stop
    raise AudioError(
        f"{what}: expected at most {wanted.max_seconds:g} s, got {(stop - start) / rate_hz:.1f} s; "
        "cut it with start_s and end_s (--start, --end), or take it whole with long (--long)"
    )


def _open_file(files: contextlib.ExitStack, path: str | os.PathLike[str], wanted: _Wanted) -> _Segment:
    import soundfile

    what = wanted.what
    check_source(path, what)

    def refuse(error: Exception) -> AudioError:
        # libsndfile's own message without the name, which is there already
        detail = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
        return AudioError(f"{what}: {path}: expected a WAV, FLAC, OGG or MP3 file, cannot read it ({detail[-120:]})")

    def blocks() -> Iterator[np.ndarray]:
        try:
            file.seek(start)
            for position in range(start, stop, BLOCK_FRAMES):
                block = file.read(min(BLOCK_FRAMES, stop - position), dtype="float32", always_2d=True)
                if len(block) == 0:
                    return
                yield block
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise refuse(error) from None

    try:
        file = files.enter_context(soundfile.SoundFile(_native(path)))
        announced = announced_frames(path, file.frames)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
        raise refuse(error) from None
    if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
        raise AudioError(
            f"{what}: {path}: expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {file.samplerate} Hz; "
            "convert the file"
        )
    if file.frames >= _UNKNOWN_FRAMES:
        raise AudioError(
            f"{what}: {path}: expected a file that states its length, got one that was written to a pipe; convert it, "
            "such as with: ffmpeg -i IN.flac OUT.wav"
        )
    if file.frames > MAX_FILE_HOURS * 3600 * file.samplerate:
        raise AudioError(
            f"{what}: {path}: expected at most {MAX_FILE_HOURS} h of audio, its header says "
            f"{file.frames / file.samplerate / 3600:.0f} h; convert the file"
        )
    if 0 < file.frames / file.samplerate < MIN_FILE_SECONDS:
        raise AudioError(
            f"{what}: {path}: expected at least {MIN_FILE_SECONDS:g} s of audio, got "
            f"{file.frames / file.samplerate:.3f} s; give a longer file"
        )
    start, stop, uncut = _segment_frames(file.frames, file.samplerate, wanted, f"{what}: {path}")
    promised = wanted.stop(announced, file.samplerate) if stop == file.frames else stop
    return _Segment(file.samplerate, file.channels, stop - start, uncut - start, promised - start, blocks())


def _open_array(source: tuple[np.ndarray, int], wanted: _Wanted) -> _Segment:
    what = wanted.what
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
    start, stop, uncut = _segment_frames(samples.shape[1], int(rate_hz), wanted, what)

    def blocks() -> Iterator[np.ndarray]:
        for position in range(start, stop, BLOCK_FRAMES):
            with np.errstate(over="ignore"):
                yield samples[:, position : min(position + BLOCK_FRAMES, stop)].T.astype(np.float32)

    return _Segment(int(rate_hz), samples.shape[0], stop - start, uncut - start, stop - start, blocks())


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


def _native(path: str | os.PathLike[str]) -> Any:
    """A path as libsndfile takes it: as bytes, since a name need not be UTF-8; but for Windows, where it is text."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def check_output_path(path: Path, *inputs: AudioInput | None) -> None:
    """Refuse an audio file that cannot be written before any work is done; see `check_target`.

    Raises:
        ParamError: unknown suffix, no such folder, not writable, or the output is an input.
    """
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise ParamError(
            f"output: expected a name ending in {', '.join(OUTPUT_FORMATS)}, or - for WAV on stdout, got {path}"
        )
    check_target(path, "output", *inputs)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes its place, on any failure it is removed.

    Raises:
        ParamError: the file system refuses the write (no space, no permission).
    """
    temporary = path.with_name(f".lada-rt-{secrets.token_hex(8)}{path.suffix}")
    try:
        # not tempfile, whose files are the owner's alone: the umask decides, as for any file
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise ParamError(f"output: {path}: cannot be written ({error.strerror}); choose another place") from None
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


class AudioWriter:
    """Writes audio as it is made: WAV, FLAC or OGG by the path's suffix, or WAV on stdout for None.

    A file appears under its name only when the `with` block ends well. WAV is written here, byte for byte the same to a
    file and to a pipe; its header holds the true length.
    """

    def __init__(self, path: Path | None, rate_hz: int, n_channels: int = 2) -> None:
        self._path = path
        self._rate_hz = rate_hz
        self._n_channels = n_channels
        self._stack = contextlib.ExitStack()
        self._bytes: BinaryIO | None = None  # a WAV
        self._encoded: Any = None  # what libsndfile writes
        self._temporary: Path | None = None
        self._expected = self._written = 0

    def __enter__(self) -> AudioWriter:
        return self

    def begin(self, n_samples: int) -> None:
        """Write the header, once the length is known.

        Raises:
            ParamError: the file system refuses the write, or the audio is too long for WAV.
            BrokenPipeError: nobody reads stdout.
        """
        self._expected = n_samples
        header = wav_header(n_samples, self._rate_hz, self._n_channels) if self._path is None or self._is_wav else b""
        with self._refusals():
            if self._path is None:
                self._bytes = sys.stdout.buffer
            else:
                self._temporary = self._stack.enter_context(replaced_file(self._path))
                if self._is_wav:
                    self._bytes = self._stack.enter_context(self._temporary.open("wb"))
                else:
                    import soundfile

                    container, subtype = OUTPUT_FORMATS[self._path.suffix.lower()]
                    self._encoded = self._stack.enter_context(
                        soundfile.SoundFile(
                            _native(self._temporary), "w", self._rate_hz, self._n_channels, subtype, format=container
                        )
                    )
            if self._bytes is not None:
                self._bytes.write(header)
                self._bytes.flush()

    def write(self, samples: np.ndarray) -> None:
        """Append [C, n] float32; the pieces add up to the length given to `begin`."""
        with self._refusals():
            for start in range(0, samples.shape[1], self._rate_hz * 10):
                block = samples[:, start : start + self._rate_hz * 10]
                if self._bytes is not None:
                    self._bytes.write(to_pcm16(block).tobytes())
                else:
                    self._encoded.write(np.clip(block.T, -1.0, 1.0))
                self._written += block.shape[1]
            if self._bytes is not None:
                self._bytes.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None or self._temporary is None:
            self._stack.__exit__(kind, error, traceback)
            return
        assert self._written == self._expected
        with self._refusals():
            if self._encoded is not None:
                self._encoded.close()
                _check_complete(self._temporary, self._expected)
            self._stack.close()

    @property
    def _is_wav(self) -> bool:
        return self._path is not None and self._path.suffix.lower() == ".wav"

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        import soundfile

        try:
            yield
        except BrokenPipeError:  # nobody reads stdout: for the caller to end quietly
            raise
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise _cannot_write(self._path or "stdout", error) from None


def write_audio(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    """Write [C, N] float32 as the file type of `path`'s suffix; a failure leaves no file behind.

    Raises:
        ParamError: the file cannot be written.
    """
    with AudioWriter(path, rate_hz, samples.shape[0]) as writer:
        writer.begin(samples.shape[1])
        writer.write(samples)


def _cannot_write(path: Path | str, error: BaseException) -> ParamError:
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
    return ParamError(f"output: {path}: cannot be written ({reason}); free some space or choose another place")


def _check_complete(path: Path, n_samples: int) -> None:
    """libsndfile does not report a full disk when it flushes on close, so count what arrived."""
    import soundfile

    found = soundfile.info(_native(path)).frames
    if found != n_samples:
        raise OSError(28, f"only {found} of {n_samples} samples could be written")
