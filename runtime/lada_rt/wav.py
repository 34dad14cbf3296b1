"""WAV byte by byte: a header for a stream, what the header of another's file announces."""

from __future__ import annotations

import os
import struct

import numpy as np

from lada_rt.errors import ParamError

__all__ = ["announced_frames", "to_pcm16", "wav_header"]


def announced_frames(path: str | os.PathLike[str], n_frames: int) -> int:
    """Frames that the header of a WAV announces, of which libsndfile found `n_frames` and said no word."""
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] + head[8:] != b"RIFFWAVE":
            return n_frames
        for _ in range(1000):  # a file of nothing but empty chunks would keep us for long
            name, n_bytes = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
            if name == b"data":
                there = os.fstat(file.fileno()).st_size - file.tell()
                # programs that write to a pipe leave 0 there, or a number just short of 2 or 4 GiB
                known = n_bytes > there > 0 and -n_bytes % 2**31 > 2**16
                return n_frames * n_bytes // there if known else n_frames
            file.seek(n_bytes + n_bytes % 2, os.SEEK_CUR)
    return n_frames


def wav_header(n_samples: int, rate_hz: int, n_channels: int = 2) -> bytes:
    """Header of a 16-bit PCM WAV of known length, for a stream that cannot be rewound.

    Raises:
        ParamError: more than the 4 GiB that the format can count.
    """
    n_bytes = n_samples * n_channels * 2
    if 36 + n_bytes >= 2**32:
        raise ParamError(f"output: expected at most 4 GiB of WAV, got {n_bytes} bytes; write .flac, or a segment")
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
