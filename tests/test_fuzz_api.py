"""Whatever is passed to the public Python API, it works or raises a documented error of one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lada_rt import GenerationParams, LadaError, Pipeline, Song, load_codes, save_codes
from lada_rt.results import Result
from stubs import GEOMETRY, no_threads_left, stub_pipeline, sung

#: derandomised, so that a run means the same everywhere
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
FAST = GenerationParams(steps=2, flow_steps=1, guidance=1.0)

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.just([]),
    st.just({}),
    st.just(()),
    st.just(object()),
    st.just(np.float32(1)),
    st.just(np.array([1.0])),
)
SAMPLES = st.one_of(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.dtype(">f4"), np.int16, np.bool_, np.complex64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
        elements={"allow_nan": True, "allow_infinity": True},
    ),
    st.sampled_from([np.float32, np.float64]).flatmap(
        lambda dtype: st.integers(1, 5000).map(lambda n: np.full((2, n), 3.0e38, dtype))
    ),
    st.just(np.asfortranarray(np.ones((2, 3000), np.float32))),
    st.just(np.ones((3000, 2), np.float32).T),
    st.just(np.ones(9000, np.float32)[::-3]),
    st.just(np.array([object()])),
    ODD,
)
RATES = st.one_of(st.sampled_from([48_000, 44_100, 1_000, 768_000, 999, np.int64(8_000), 48_000.0]), ODD)
AUDIO = st.one_of(st.tuples(SAMPLES, RATES), ODD, st.tuples(SAMPLES), st.tuples(SAMPLES, RATES, RATES))
SECONDS = st.one_of(st.sampled_from([0, 0.0, 0.001, 0.05, 1, 1e300]), ODD)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return stub_pipeline(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def result(pipe: Pipeline) -> Result:
    return pipe.generate((sung(48_000 * 2), 48_000), params=FAST)


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or None after a documented error."""
    message, made = None, None
    try:
        made = call()
    except LadaError as error:
        message = str(error)
    assert message is None or (message and "\n" not in message)
    assert no_threads_left()
    return made


@FUZZ
@given(vocal=AUDIO, start_s=SECONDS, end_s=SECONDS)
def test_vocals(pipe: Pipeline, vocal: Any, start_s: Any, end_s: Any) -> None:
    made = attempt(lambda: pipe.generate(vocal, params=FAST, start_s=start_s, end_s=end_s))
    if made is not None:
        assert np.isfinite(made.audio).all()
        assert made.audio.shape == (2, GEOMETRY.n_samples(len(made.codes)))


@FUZZ
@given(text=ODD, reference=AUDIO, long=ODD, on_progress=ODD)
def test_conditions(pipe: Pipeline, text: Any, reference: Any, long: Any, on_progress: Any) -> None:
    attempt(
        lambda: pipe.generate(
            (sung(2000), 48_000), text=text, reference=reference, params=FAST, long=long, on_progress=on_progress
        )
    )


@FUZZ
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "steps": st.one_of(st.integers(1, 4), ODD.filter(lambda v: not isinstance(v, int) or v > 10_000 or v < 1)),
            "schedule": st.one_of(
                st.sampled_from(["cosine", "power:1e-300", "power:nan", [1.0], (0.5, 0.0), [0, 1], ["a"]]),
                st.lists(st.floats(), max_size=3),
                ODD,
            ),
            "strategy": st.one_of(st.sampled_from(["random", "fixed_position", "one_shot"]), ODD),
            "top_k": st.one_of(st.integers(1, 100), ODD),
            "top_p": st.one_of(st.floats(0, 1), ODD),
            "temperature": st.one_of(st.floats(1e-30, 10), ODD),
            "mask_temperature": st.one_of(st.floats(0, 100), ODD),
            "flow_steps": st.one_of(
                st.integers(1, 3), ODD.filter(lambda v: not isinstance(v, int) or v > 10_000 or v < 1)
            ),
            "guidance": st.one_of(st.floats(-5, 5), ODD),
            "seed": st.one_of(st.integers(0, 2**64 - 1), ODD),
            "prefix_order": ODD,
        },
    )
)
def test_params(pipe: Pipeline, options: dict[str, Any]) -> None:
    params = attempt(lambda: GenerationParams(**{"steps": 2, "flow_steps": 1, **options}))
    if params is not None:
        made = attempt(lambda: pipe.generate((sung(4000), 48_000), params=params))
        assert made is None or ((made.codes >= 0) & (made.codes < 64)).all()


@FUZZ
@given(start_s=st.one_of(st.floats(0, 2), SECONDS), end_s=st.one_of(st.floats(0, 3), SECONDS), seed=ODD, params=ODD)
def test_regions(pipe: Pipeline, result: Result, start_s: Any, end_s: Any, seed: Any, params: Any) -> None:
    new = attempt(lambda: pipe.regenerate(result, start_s, end_s, seed=seed, params=params))
    assert new is None or new.audio.shape == result.audio.shape


@FUZZ
@given(songs=st.one_of(ODD, st.lists(st.one_of(ODD, AUDIO, AUDIO.map(Song)), max_size=2)), variations=ODD)
def test_batches(pipe: Pipeline, songs: Any, variations: Any) -> None:
    count = variations if isinstance(variations, int) and abs(variations) > 3 else 2
    attempt(lambda: list(pipe.generate_batch(songs, params=FAST, variations=count)))


@FUZZ
@given(data=st.data())
def test_codes_files(pipe: Pipeline, result: Result, tmp_path: Path, data: st.DataObject) -> None:
    """A saved run with some of its bytes changed, cut or doubled comes back only if it is as it was."""
    path = tmp_path / "run.npz"
    save_codes(path, result)
    whole = bytearray(path.read_bytes())
    # the latents are most of the file, so look at what stands before and after them more often
    end = len(whole) - 1
    positions = st.one_of(st.integers(0, 3000), st.integers(end - 1000, end), st.integers(0, end))
    for position in data.draw(st.lists(positions, max_size=3)):
        whole[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    path.write_bytes(whole[:cut])
    back = attempt(lambda: pipe.restore(load_codes(path), (sung(48_000 * 2), 48_000)))
    if back is not None:
        np.testing.assert_array_equal(back.codes, result.codes)


@FUZZ
@given(
    options=st.fixed_dictionaries({}, optional=dict.fromkeys(("backend", "device", "n_threads", "max_concurrent"), ODD))
)
def test_load(tmp_path: Path, options: dict[str, Any]) -> None:
    """On a bundle whose graphs are empty nothing loads, so every call ends in an error, a documented one."""
    from stubs import write_stub_bundle

    folder = tmp_path / "stub.bundle"
    if not folder.exists():
        write_stub_bundle(folder)
    assert attempt(lambda: Pipeline.load(folder, **options)) is None


def test_the_pipeline_still_works(pipe: Pipeline, result: Result) -> None:
    """After all of the above: same bytes as before, nothing left behind."""
    again = pipe.generate((sung(48_000 * 2), 48_000), params=FAST)
    np.testing.assert_array_equal(again.audio, result.audio)
    assert threading.active_count() <= 2
