"""Progress, timing and cancelling of one run: one callback for all three."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lada_rt.engines.base import Engine
from lada_rt.stream import Cancel

__all__ = ["OnProgress", "Progress", "Reporter"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: `encode`, `condition`, `denoise`, `flow` or `render`; flow and render advance side by side.
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
        self.started = time.perf_counter()
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
        return time.perf_counter() - self.started

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
    def __init__(self, name: str, engine: Engine, seconds: dict[str, float]) -> None:
        self._name = name
        self._engine = engine
        self._seconds = seconds

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        outputs = self._engine.run(**inputs)
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - start
        return outputs
