"""From the chunks of a run to a file or a pipe: mixing, writing as they come, measuring, noticing a lost reader."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lada_rt import loudness
from lada_rt.audio import AudioWriter
from lada_rt.errors import ParamError
from lada_rt.mix import CEILING_DBTP, Mixer, MixGain, true_peak

__all__ = ["Delivery"]


class Delivery:
    """Takes the pieces of an accompaniment to where they belong, each as soon as it is final."""

    def __init__(self, path: Path | None, rate_hz: int, *, mix: bool, measure: bool) -> None:
        """Write to `path`, or to stdout for None.

        Args:
            path: a .wav, .flac or .ogg name.
            rate_hz: of the audio.
            mix: add the vocal; the output then has its length.
            measure: hold the audio for `measurements`.
        """
        self._rate_hz = rate_hz
        self._mix = mix
        self._measure = measure
        self._to_stdout = path is None
        self._writer = AudioWriter(path, rate_hz)
        self._mixer: Mixer | None = None
        self._vocal: np.ndarray | None = None
        self._received: list[np.ndarray] = []
        self._sent: list[np.ndarray] = []
        self.peak = 0.0
        #: length of the output; None until `begin`
        self.n_samples: int | None = None

    def __enter__(self) -> Delivery:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, traceback)

    def begin(self, n_samples: int, vocal: np.ndarray) -> None:
        """Send the header, once the length of the accompaniment and the vocal [C, M] are known; does nothing again.

        Raises:
            ParamError: the output cannot be written.
            BrokenPipeError: nobody reads stdout.
        """
        if self.n_samples is not None:
            return
        self._vocal = vocal
        if self._mix:
            self._mixer = Mixer(vocal, n_samples)
            n_samples = self._mixer.n_samples
        self.n_samples = n_samples
        with self._giving_up():
            self._writer.begin(n_samples)

    def write(self, accompaniment: np.ndarray) -> None:
        """Take the next [2, n] float32; raises as `begin`."""
        final = accompaniment if self._mixer is None else self._mixer.push(accompaniment)
        if final.size:
            self.peak = max(self.peak, float(np.abs(final).max()))
        with self._giving_up():
            self._writer.write(final)
        if self._measure:
            self._received.append(accompaniment)
            self._sent.append(final)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """A stdout that takes no more, its disk being full, must not be tried again at exit."""
        try:
            yield
        except ParamError:
            self.abandon()
            raise

    def reader_gone(self) -> bool:
        """Whether stdout is a pipe that nobody reads any more. Without writing to it, so while nothing is ready yet."""
        if not self._to_stdout or not hasattr(select, "poll"):
            return False
        try:
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)
            return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        except (OSError, ValueError):  # stdout is no file at all
            return False

    def abandon(self) -> None:
        """Keep the interpreter from flushing into stdout at exit."""
        if self._to_stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @property
    def gain(self) -> MixGain | None:
        """What keeping the mix below its ceiling took; None without a mix."""
        return None if self._mixer is None else self._mixer.gain

    def measurements(self) -> dict[str, Any]:
        """Peaks, mixing gain and loudness for the report; wants `measure`."""
        assert self._vocal is not None
        output = np.concatenate(self._sent, axis=1)
        accompaniment = output if self._mixer is None else np.concatenate(self._received, axis=1)
        gain = self.gain
        peak = true_peak(output)
        report: dict[str, Any] = {
            "peak": self.peak,
            "true_peak_dbtp": None if peak == 0 else 20 * float(np.log10(peak)),
            "mix_gain": None
            if gain is None
            else {
                "vocal_db": 0.0,
                "accompaniment_db": 0.0,
                "ceiling_dbtp": CEILING_DBTP,
                "lowest_gain_db": gain.lowest_gain_db,
                "limited_s": gain.limited_s,
            },
        }
        if not loudness.available():
            return {**report, "loudness_lufs": None, "loudness_note": loudness.REMEDY}
        vocal = self._vocal.mean(axis=0, dtype=np.float32, keepdims=True)
        lufs = {
            "vocal": loudness.integrated_lufs(vocal, self._rate_hz),
            "accompaniment": loudness.integrated_lufs(accompaniment, self._rate_hz),
        }
        lufs["output"] = lufs["accompaniment"] if gain is None else loudness.integrated_lufs(output, self._rate_hz)
        return {**report, "loudness_lufs": lufs}
