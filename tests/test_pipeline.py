"""The main path with trivial networks: lengths, streaming, determinism, progress, cancelling, threads, fork."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from lada_rt import AudioError, EngineError, GenerationCancelled, GenerationParams, ParamError, Progress
from lada_rt.decode import VOCODER_BLOCK_FRAMES, render_pieces
from lada_rt.pipeline import Pipeline
from stubs import GEOMETRY, VOCAB, no_threads_left, stub_pipeline, sung

FAST = GenerationParams(steps=3, flow_steps=2)
#: code counts around the edges of the decoder's windows
EDGES = [1, 25, 767, 768, 769, 1023, 1024, 1025, 1664, 1792, 1793, 3968, 4097, 6001]


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return stub_pipeline(tmp_path)


def samples_for(n_codes: int) -> int:
    """The fewest samples that give `n_codes` codes."""
    n = max(1, (n_codes - 1) * 1920)
    while GEOMETRY.n_codes(n) < n_codes:
        n += 1
    assert GEOMETRY.n_codes(n) == n_codes
    return n


@pytest.mark.parametrize("n_codes", EDGES)
def test_chunks_joined_equal_generate(pipe: Pipeline, n_codes: int) -> None:
    vocal = (sung(samples_for(n_codes)), 48_000)
    chunks = list(pipe.stream(vocal, text="soul", params=FAST))
    result = pipe.generate(vocal, text="soul", params=FAST)
    np.testing.assert_array_equal(np.concatenate([c.samples for c in chunks], axis=1), result.audio)
    assert result.audio.dtype == np.float32
    assert result.audio.shape == (2, GEOMETRY.n_samples(n_codes))
    assert result.codes.shape == (n_codes,)
    assert result.codes.dtype == np.int32
    assert ((result.codes >= 0) & (result.codes < VOCAB)).all()
    # one for each block of the vocoder, from the start of every window on, up to where the next window fades in
    hop, block, last = GEOMETRY.hop_samples, VOCODER_BLOCK_FRAMES * 480, GEOMETRY.n_windows(n_codes) - 1
    starts = [
        start
        for window in range(last + 1)
        for start in range(window * hop, result.audio.shape[1] if window == last else (window + 1) * hop, block)
    ]
    assert [c.start_sample for c in chunks] == starts
    assert {c.total_samples for c in chunks} == {result.audio.shape[1]}


def test_blocks_of_the_vocoder_do_not_show(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    vocal = (sung(48_000 * 20), 48_000)
    usual = pipe.generate(vocal, params=FAST).audio
    monkeypatch.setattr("lada_rt.decode.render_pieces", functools.partial(render_pieces, block_frames=4096))
    np.testing.assert_allclose(pipe.generate(vocal, params=FAST).audio, usual, atol=1e-6)


def test_same_seed_same_bytes_other_seed_other_bytes(pipe: Pipeline) -> None:
    vocal = (sung(48_000 * 2), 48_000)
    first, again = (pipe.generate(vocal, params=FAST) for _ in range(2))
    other = pipe.generate(vocal, params=GenerationParams(steps=3, flow_steps=2, seed=14))
    np.testing.assert_array_equal(first.audio, again.audio)
    assert not np.array_equal(first.codes, other.codes)
    assert not np.array_equal(first.audio, other.audio)


def test_rows_are_compacted_to_the_masked_ones(pipe: Pipeline) -> None:
    pipe.generate((sung(48_000 * 4), 48_000), params=GenerationParams(steps=8, flow_steps=1))
    seen = pipe._engines["denoiser"].rows_seen
    assert seen[0] == 101
    assert len(seen) == 8
    assert all(a > b > 0 for a, b in itertools.pairwise(seen))


def test_one_shot_is_one_evaluation(pipe: Pipeline) -> None:
    pipe.generate((sung(48_000), 48_000), params=GenerationParams(strategy="one_shot", flow_steps=1))
    assert pipe._engines["denoiser"].rows_seen == [26]


def test_prefix_slots(pipe: Pipeline) -> None:
    """Order and zero slots of spec/lada_band c."""
    vocal, reference = (sung(48_000), 48_000), (sung(96_000, seed=1), 48_000)
    prefixes = pipe._engines["denoiser"].prefixes

    def prefix(**options: object) -> np.ndarray:
        prefixes.clear()
        pipe.generate(vocal, **{"params": FAST, **options})
        return prefixes[0][0]

    assert prefix().shape == (0, 8)
    text = prefix(text="soul")
    assert text.shape == (2, 8)
    assert not text[0].any()
    assert text[1].any()
    empty = prefix(text="")
    assert empty[1].any()
    only_reference = prefix(reference=reference)
    assert only_reference[0].any()
    assert not only_reference[1].any()
    both = prefix(text="soul", reference=reference)
    np.testing.assert_array_equal(both, np.stack([only_reference[0], text[1]]))
    swapped = GenerationParams(steps=3, flow_steps=2, prefix_order="text,ref")
    np.testing.assert_array_equal(prefix(text="soul", reference=reference, params=swapped), both[::-1])


def test_progress_is_complete_and_never_goes_back(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe.generate((sung(48_000 * 50), 48_000), text="", params=FAST, on_progress=seen.append)
    for stage, total in (("encode", 2), ("condition", 2), ("denoise", 3), ("flow", 4), ("render", 2)):
        steps = [p.step for p in seen if p.stage == stage]
        assert steps == list(range(total + 1)), stage
        assert {p.total for p in seen if p.stage == stage} == {total}


@pytest.mark.parametrize("stage", ["encode", "condition", "denoise", "flow", "render"])
def test_callback_cancels_at_any_stage(pipe: Pipeline, stage: str) -> None:
    after: list[Progress] = []

    def stop(progress: Progress) -> bool:
        if after or (progress.stage == stage and progress.step == 1):
            after.append(progress)
            return False
        return True

    with pytest.raises(GenerationCancelled):
        pipe.generate((sung(48_000 * 50), 48_000), params=FAST, on_progress=stop)
    assert len(after) == 1
    assert no_threads_left()


def test_nothing_competes_with_the_first_sound(pipe: Pipeline) -> None:
    """First audio must not wait for more than flow and mel of its own window, and one block of the waveform."""
    events: list[str] = []

    class Watch:
        def __init__(self, name: str) -> None:
            self.name, self.engine = name, pipe._engines[name]

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            outputs = self.engine.run(**inputs)
            events.append(self.name)
            return outputs

    pipe._engines |= {name: Watch(name) for name in ("flow", "vocoder")}
    timings = pipe.generate((sung(48_000 * 150), 48_000), params=FAST).timings
    first_flow, first_render = FAST.flow_steps, 2  # a block of each channel
    assert events[: first_flow + first_render] == ["flow"] * first_flow + ["vocoder"] * first_render
    bound = timings.encode_s + timings.condition_s + timings.denoise_s + timings.first_window_s
    assert timings.first_audio_s >= bound * 0.99


def test_callback_error_reaches_the_caller(pipe: Pipeline) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == "denoise":
            raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        pipe.generate((sung(48_000), 48_000), params=FAST, on_progress=fail)
    assert no_threads_left()


def test_engine_error_reaches_the_caller(pipe: Pipeline) -> None:
    class Broken:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            raise EngineError("the device went away; restart it")

    pipe._engines["flow"] = Broken()
    with pytest.raises(EngineError, match="went away"):
        pipe.generate((sung(48_000), 48_000), params=FAST)
    assert no_threads_left()


def test_closing_the_stream_stops_the_work(pipe: Pipeline) -> None:
    stream = pipe.stream((sung(48_000 * 200), 48_000), params=FAST)
    next(stream)
    stream.close()
    assert no_threads_left()
    calls = len(pipe._engines["denoiser"].rows_seen)
    time.sleep(0.05)
    assert len(pipe._engines["denoiser"].rows_seen) == calls


def test_dropping_the_stream_stops_the_work(pipe: Pipeline) -> None:
    stream = pipe.stream((sung(48_000 * 200), 48_000), params=FAST)
    next(stream)
    del stream
    assert no_threads_left()


def test_stream_tells_what_generate_tells(pipe: Pipeline) -> None:
    broken = sung(48_000 * 40)
    broken[7] = np.nan
    result = pipe.generate((broken, 48_000), text="soul", params=FAST)
    stream = pipe.stream((broken, 48_000), text="soul", params=FAST, keep_latents=True)
    assert stream.total_samples is None
    assert stream.codes is None
    with pytest.raises(ParamError, match="still to come"):
        stream.result()
    with stream:
        chunks = [next(stream)]
        assert stream.total_samples == result.audio.shape[1]
        np.testing.assert_array_equal(stream.codes, result.codes)
        np.testing.assert_array_equal(stream.vocal, result.vocal)
        assert stream.timings is None
        chunks.extend(stream)
    assert stream.warnings == result.warnings
    assert stream.timings is not None
    ours = stream.result(np.concatenate([c.samples for c in chunks], axis=1))
    np.testing.assert_array_equal(ours.audio, result.audio)
    np.testing.assert_array_equal(ours.origin.layers[0].latents, result.origin.layers[0].latents)
    with pytest.raises(StopIteration):
        next(stream)


def test_interrupt_in_the_consumer_stops_the_work(pipe: Pipeline) -> None:
    """Ctrl-C arrives as an exception in the thread that renders."""

    class Interrupted:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            raise KeyboardInterrupt

    pipe._engines["vocoder"] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        pipe.generate((sung(48_000 * 200), 48_000), params=FAST)
    assert no_threads_left()


def test_error_in_the_consumer_stops_the_work(pipe: Pipeline) -> None:
    def consume() -> None:
        for _ in pipe.stream((sung(48_000 * 200), 48_000), params=FAST):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert no_threads_left()


def test_slow_consumer_bounds_the_producer(pipe: Pipeline) -> None:
    """At most one finished window waits and one is in the making, however long the song."""
    flow_steps_done: list[int] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "flow":
            flow_steps_done.append(progress.step)

    stream = pipe.stream((sung(48_000 * 240), 48_000), params=FAST, on_progress=watch)
    next(stream)
    time.sleep(0.5)
    assert max(flow_steps_done) <= 3 * FAST.flow_steps
    stream.close()


def test_threads_get_the_results_of_serial_calls(tmp_path: Path) -> None:
    pipe = stub_pipeline(tmp_path, max_concurrent=2)
    jobs = [(sung(48_000 + 1000 * i, seed=i), GenerationParams(steps=3, flow_steps=2, seed=i)) for i in range(6)]
    serial = [pipe.generate((vocal, 48_000), params=params).audio for vocal, params in jobs]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        vocal, params = jobs[i]
        found[i] = pipe.generate((vocal, 48_000), params=params).audio

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(serial):
        np.testing.assert_array_equal(found[i], expected)


def test_max_concurrent_bounds_the_calls(tmp_path: Path) -> None:
    pipe = stub_pipeline(tmp_path, max_concurrent=1)
    gate = pipe._engines["denoiser"].gate = threading.Event()
    started: list[str] = []

    def work(name: str) -> None:
        def watch(progress: Progress) -> None:
            if progress.stage != "queue":
                started.append(name)

        pipe.generate((sung(4800), 48_000), params=FAST, on_progress=watch)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert len(set(started)) == 1
    gate.set()
    for thread in threads:
        thread.join()
    assert len(set(started)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_load_is_refused(pipe: Pipeline) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def child() -> None:
        try:
            pipe.generate((sung(4800), 48_000), params=FAST)
            answers.put("ran")
        except EngineError as error:
            answers.put(str(error))

    process = context.Process(target=child)
    process.start()
    assert "forked" in answers.get(timeout=20)
    process.join()


def test_timings_add_up(pipe: Pipeline) -> None:
    timings = pipe.generate((sung(48_000 * 50), 48_000), text="", params=FAST).timings
    stages = timings.encode_s + timings.condition_s + timings.denoise_s + timings.decode_s
    assert 0 < timings.first_audio_s <= timings.total_s
    assert abs(stages - timings.total_s) < 0.25 * timings.total_s + 0.02
    assert timings.rtf == pytest.approx(timings.total_s / timings.audio_s)
    assert set(timings.engines_s) == {"encoder", "text_encoder", "denoiser", "flow", "mel_decoder", "vocoder"}


@pytest.mark.parametrize(
    ("vocal", "error"),
    [
        ("no-such-file.wav", AudioError),
        ((np.zeros(0, np.float32), 48_000), AudioError),
        ((np.zeros(48_000 * 361, np.float32), 48_000), AudioError),
        ((np.zeros((48_000, 2), np.float32), 48_000), ParamError),
        ((np.zeros(100, np.int16), 48_000), ParamError),
        ((np.zeros((1, 2, 3), np.float32), 48_000), ParamError),
        ((np.zeros(100, np.float32), 0), ParamError),
        ((np.zeros(100, np.float32), 48_000.0), ParamError),
        ((np.zeros(100, np.float32),), ParamError),
        (None, ParamError),
        (3, ParamError),
    ],
)
def test_bad_vocals(pipe: Pipeline, vocal: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        pipe.generate(vocal, params=FAST)
    assert no_threads_left()


def test_bad_text_and_params(pipe: Pipeline) -> None:
    vocal = (sung(4800), 48_000)
    with pytest.raises(ParamError):
        pipe.generate(vocal, text=3)
    with pytest.raises(ParamError):
        pipe.generate(vocal, params={"steps": 3})
    with pytest.raises(ParamError):
        pipe.generate(vocal, text="lone \ud800 surrogate", params=FAST)
    with pytest.raises(AudioError):
        pipe.generate(vocal, reference=(np.zeros(10, np.float32), 48_000), params=FAST)


def test_silence_and_bad_samples_work(pipe: Pipeline) -> None:
    assert np.isfinite(pipe.generate((np.zeros(48_000, np.float32), 48_000), params=FAST).audio).all()
    broken = sung(48_000)
    broken[[5, 50, 500]] = np.nan, np.inf, -np.inf
    result = pipe.generate((broken, 48_000), params=FAST)
    assert np.isfinite(result.audio).all()
    assert "3 samples" in result.warnings[0]
