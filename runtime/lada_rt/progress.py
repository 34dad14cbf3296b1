"""Progress, timing and cancelling of one run: one callback for all three."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lada_rt.engines.base import Engine, loop_of
from lada_rt.memory import return_freed
from lada_rt.results import Timings
from lada_rt.slots import Slots
from lada_rt.stream import POLL_SECONDS, Cancel

__all__ = ["OnProgress", "Progress", "Reporter"]

DECODER_STAGES = ("flow", "mel_decoder", "vocoder")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: `encode`, `condition`, `denoise`, `flow` or `render`; flow and render advance side by side. Before them,
            again and again, `queue` at step 0 of 1 while the pipeline is busy with as many runs as it makes at once.
        step: steps of the stage done, from 0; never goes back within a stage.
        total: steps of the stage in all.
    """

    stage: str
    step: int
    total: int


#: Called from whichever thread does the work, one call at a time. Returning False cancels the run.
OnProgress = Callable[[Progress], bool | None]


class Reporter:
    """Counts one run: tells the caller, notes seconds per stage and per engine, and passes on a wish to stop."""

    def __init__(self, on_progress: OnProgress | None, cancel: Cancel) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.cancel = cancel
        self._started = time.perf_counter()
        self._first_audio = threading.Event()
        self._first_audio_s = self._first_window_s = self._denoised_s = 0.0
        #: waiting for a free slot of the pipeline, before the work started
        self.queue_s = 0.0
        #: wall seconds of each stage of the main path
        self.stage_s: dict[str, float] = {}
        #: busy seconds of each engine
        self.engine_s: dict[str, float] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        """Report progress.

        Raises:
            GenerationCancelled: the run is to stop.
        """
        self.cancel.check()
        if self._on_progress is None:
            return
        with self._lock:
            if self._on_progress(Progress(stage, done, total)) is False:
                self.cancel.cancel()
        self.cancel.check()

    def steps_of(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.step(stage, done, total)

    def elapsed_s(self) -> float:
        """Seconds since the work started."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def holding(self, slots: Slots) -> Iterator[None]:
        """Wait for a slot, then start the clock; when done, give the memory back.

        Raises:
            GenerationCancelled: the run is to stop.
        """
        self._started = time.perf_counter()
        slots.acquire(lambda: self.step("queue", 0, 1))
        try:
            self.queue_s = self.elapsed_s()
            self._started = time.perf_counter()
            yield
        finally:
            return_freed()
            slots.release()

    def mark_denoised(self) -> None:
        self._denoised_s = self.elapsed_s()

    def mark_first_audio(self) -> None:
        """The first piece of audio is final; later calls change nothing."""
        if not self._first_audio.is_set():
            self._first_audio_s = self.elapsed_s()
            self._first_window_s = sum(self.engine_s.get(stage, 0.0) for stage in DECODER_STAGES)
            self._first_audio.set()

    def wait_first_audio(self) -> None:
        """Block until the first piece of audio is final.

        Raises:
            GenerationCancelled: the run is to stop.
        """
        while not self._first_audio.wait(POLL_SECONDS):
            self.cancel.check()

    def timings(self, audio_s: float) -> Timings:
        """The seconds of the finished run, which made `audio_s` of audio."""
        total_s = self.elapsed_s()
        return Timings(
            encode_s=self.stage_s.get("encode", 0.0),
            condition_s=self.stage_s.get("condition", 0.0),
            denoise_s=self.stage_s.get("denoise", 0.0),
            decode_s=total_s - self._denoised_s,
            total_s=total_s,
            first_audio_s=self._first_audio_s,
            first_window_s=self._first_window_s,
            queue_s=self.queue_s,
            audio_s=audio_s,
            rtf=total_s / audio_s,
            engines_s=dict(self.engine_s),
        )

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stage_s[stage] = self.stage_s.get(stage, 0.0) + time.perf_counter() - start

    def timed_engines(self, engines: Mapping[str, Engine]) -> dict[str, Engine]:
        """The same engines, each adding its busy time to `engine_s`."""
        return {name: _TimedEngine(name, engine, self.engine_s) for name, engine in engines.items()}


class _TimedEngine:
    """An engine whose busy seconds are noted: of every run, or of the loop that it runs itself."""

    def __init__(self, name: str, engine: Engine, seconds: dict[str, float]) -> None:
        self._name = name
        self._engine = engine
        self._seconds = seconds
        loop = loop_of(engine)
        self.loop = None if loop is None else self._timed(loop)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        with self._busy():
            return self._engine.run(**inputs)

    def _timed(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self._busy():
                result = loop(*args, **options)
            return self._timed_items(result) if isinstance(result, Iterator) else result

        return timed

    def _timed_items(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._busy():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - start
