"""A batch goes on behind a song that failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lada_rt import AudioError, GenerationCancelled, GenerationParams, Pipeline, Progress
from lada_rt.errors import EngineError
from stubs import stub_pipeline, sung

FAST = GenerationParams(steps=2, flow_steps=1)
GOOD, OTHER = (sung(4800), 48_000), (sung(9600, seed=1), 48_000)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return stub_pipeline(tmp_path, max_concurrent=1)


@pytest.mark.parametrize("variations", [1, 2])
def test_the_songs_after_a_bad_one_are_made(pipe: Pipeline, variations: int) -> None:
    results = pipe.generate_batch([GOOD, "missing.wav", "gone.wav", OTHER], params=FAST, variations=variations)
    found = [next(results) for _ in range(variations)]
    for name in ("missing.wav", "gone.wav"):
        with pytest.raises(AudioError, match=name):
            next(results)
    found += list(results)
    assert [len(result.codes) for result in found] == [3] * variations + [6] * variations
    assert [result.params.seed for result in found] == [FAST.seed + n for n in range(variations)] * 2
    np.testing.assert_array_equal(found[-variations].audio, pipe.generate(OTHER, params=FAST).audio)
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_ends_a_songs_variations(pipe: Pipeline) -> None:
    """The second of three fails: the third is not made, the next song is."""
    vocoder, failing = pipe._engines["vocoder"], False

    class Fails:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            if failing:
                raise EngineError("failed")
            return vocoder.run(**inputs)

    pipe._engines |= {"vocoder": Fails()}
    results = pipe.generate_batch([GOOD, OTHER], params=FAST, variations=3)
    assert next(results).params.seed == FAST.seed
    failing = True
    with pytest.raises(EngineError, match="failed"):
        next(results)
    failing = False
    assert [(len(r.codes), r.params.seed - FAST.seed) for r in results] == [(6, 0), (6, 1), (6, 2)]


def test_a_cancelled_song_and_the_next(pipe: Pipeline) -> None:
    stop = True
    seen: list[str] = []

    def watch(progress: Progress) -> bool:
        seen.append(progress.stage)
        return not stop

    results = pipe.generate_batch([GOOD, OTHER], params=FAST, on_progress=watch)
    with pytest.raises(GenerationCancelled):
        next(results)
    stop = False
    assert [len(result.codes) for result in results] == [6]
    assert "render" in seen


def test_songs_are_taken_as_their_results_are(pipe: Pipeline) -> None:
    taken: list[int] = []

    def songs() -> Iterator[object]:
        for number, song in enumerate((GOOD, "missing.wav", OTHER)):
            taken.append(number)
            yield song

    results = pipe.generate_batch(songs(), params=FAST)
    assert not taken
    next(results)
    assert taken == [0]
    with pytest.raises(AudioError):
        next(results)
    assert taken == [0, 1]
    assert len(list(results)) == 1


def test_songs_that_cannot_be_listed_further_end_the_batch(pipe: Pipeline) -> None:
    def songs() -> Iterator[object]:
        yield GOOD
        raise OSError("the list's own")

    results = pipe.generate_batch(songs(), params=FAST)
    next(results)
    with pytest.raises(OSError, match="the list's own"):
        next(results)
    assert list(results) == []
