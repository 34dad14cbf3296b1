"""Stopping a run from outside the thread that makes it, also one that waits for its turn."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lada_rt import GenerationCancelled, GenerationParams, Progress
from lada_rt.long_song import denoise_spans
from lada_rt.pipeline import Pipeline
from stubs import no_threads_left, stub_pipeline, sung

FAST = GenerationParams(steps=3, flow_steps=2)
LONG = (sung(48_000 * 200), 48_000)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return stub_pipeline(tmp_path, max_concurrent=1)


class Gated:
    """An engine that waits in its call."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.entered, self.gate = threading.Event(), threading.Event()

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.entered.set()
        assert self.gate.wait(20)
        outputs: dict[str, np.ndarray] = self.engine.run(**inputs)
        return outputs


@pytest.mark.parametrize("stage", ["denoiser", "vocoder"])
def test_closing_a_stream_that_another_thread_waits_for(pipe: Pipeline, stage: str) -> None:
    """In the thread that works ahead, and in the one that takes the chunks."""
    gated = Gated(pipe._engines[stage])
    pipe._engines |= {stage: gated}
    stream = pipe.stream(LONG, params=FAST)
    with ThreadPoolExecutor(1) as other:
        chunk = other.submit(next, stream)
        assert gated.entered.wait(20)
        stream.close()
        gated.gate.set()
        with pytest.raises(GenerationCancelled):
            chunk.result(20)
    assert no_threads_left()
    # the slot is free again
    assert pipe.generate((sung(4800), 48_000), params=FAST).audio.shape[1] > 0
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_before_the_first_chunk_and_after_the_last(pipe: Pipeline) -> None:
    unused = pipe.stream(LONG, params=FAST)
    unused.close()
    with pytest.raises(StopIteration):
        next(unused)
    stream = pipe.stream((sung(4800), 48_000), params=FAST)
    chunks = list(stream)
    stream.close()
    assert stream.result().codes.shape == (3,)
    assert chunks


@pytest.mark.parametrize("by", ["consumer", "another thread", "progress"])
def test_a_stream_cut_between_two_chunks_does_not_look_whole(pipe: Pipeline, by: str) -> None:
    """A time limit that closes it while the consumer sends a chunk must not deliver half a song as a song."""
    sending = threading.Event()
    closed = threading.Event()
    streams: list[Any] = []

    def close(progress: Progress) -> None:
        if by == "progress" and sending.is_set() and not closed.is_set():
            streams[0].close()  # in the thread that works ahead
            closed.set()

    stream = pipe.stream(LONG, params=FAST, on_progress=close)
    streams.append(stream)
    next(stream)
    sending.set()
    if by == "another thread":
        with ThreadPoolExecutor(1) as other:
            other.submit(stream.close).result(20)
    elif by == "consumer":
        stream.close()
    else:
        assert closed.wait(20)
    with pytest.raises(GenerationCancelled):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert no_threads_left()
    assert pipe.generate((sung(4800), 48_000), params=FAST).audio.shape[1] > 0


ENDING = """
import sys
from pathlib import Path
from stubs import stub_pipeline, sung
from lada_rt import GenerationParams

stream = stub_pipeline(Path(sys.argv[1])).stream((sung(48_000 * 200), 48_000), params=GenerationParams(steps=3))
next(stream)
{ending}
"""


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_an_interpreter_that_ends_amid_a_song_ends_in_order(tmp_path: Path, ending: str, code: int) -> None:
    """A service keeps its streams somewhere: at SIGTERM some are under way."""
    script = tmp_path / "service.py"
    script.write_text(ENDING.format(ending=ending))
    for attempt in range(3):  # it was a race
        folder = tmp_path / str(attempt)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(folder)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert b"terminate called" not in done.stderr


@pytest.mark.parametrize("by", ["callback", "close"])
def test_a_run_that_waits_for_a_slot_can_be_stopped(pipe: Pipeline, by: str) -> None:
    """A time limit counts while others are served too."""
    gated = Gated(pipe._engines["encoder"])
    pipe._engines |= {"encoder": gated}
    queued = threading.Event()
    seen: list[Progress] = []

    def watch(progress: Progress) -> bool:
        seen.append(progress)
        queued.set()
        return by != "callback"

    with ThreadPoolExecutor(2) as pool:
        served = pool.submit(pipe.generate, (sung(4800), 48_000), params=FAST)
        assert gated.entered.wait(20)
        stream = pipe.stream((sung(4800), 48_000), params=FAST, on_progress=watch)
        waiting = pool.submit(next, stream)
        assert queued.wait(20)
        if by == "close":
            stream.close()
        with pytest.raises(GenerationCancelled):
            waiting.result(20)
        assert set(seen) == {Progress("queue", 0, 1)}
        assert not served.done()
        gated.gate.set()
        assert served.result(20).audio.shape[1] > 0


def test_a_later_span_of_a_long_song_can_be_stopped_while_it_waits() -> None:
    """On a GPU a denoiser tells step 0 again and again while another song has its tensors."""
    calls: list[int] = []

    def loop(*args: object, on_step: Callable[[int, int], None], known: np.ndarray, **options: object) -> np.ndarray:
        calls.append(1)
        for _ in range(3 if len(calls) == 2 else 1):
            on_step(0, 4)
        return np.zeros_like(known)

    engine: Any = SimpleNamespace(loop=loop)
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise GenerationCancelled("generation cancelled")

    vocal, prefix = np.zeros(30, np.int64), np.zeros((2, 4), np.float32)
    with pytest.raises(GenerationCancelled):
        denoise_spans(engine, vocal, prefix, FAST, 64, max_codes=10, on_step=stop)
    # the first span's beginning, and the second's while it waits: of the latter the first is what came before
    assert told == [(0, 16), (4, 16), (4, 16)]
