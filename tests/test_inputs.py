"""What a run is given: references with a start of their own, and mistakes that are told before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lada_rt import AudioError, GenerationParams, ParamError, cli
from lada_rt.long_song import spans
from lada_rt.pipeline import Pipeline
from lada_rt.results import Song
from stubs import StubDenoiser, StubReference, stub_pipeline, sung

RATE_HZ = 48_000
FAST = GenerationParams(steps=3, flow_steps=2)


class Seen:
    """An engine that keeps what it is given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        return self.engine.run(**inputs)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return stub_pipeline(tmp_path, max_seconds=30)


def heard(pipe: Pipeline, **options: Any) -> np.ndarray:
    """The reference as its encoder gets it, [N]."""
    seen = pipe._engines["ref_encoder"] = Seen(StubReference())
    pipe.generate((sung(RATE_HZ * 4), RATE_HZ), params=FAST, **options)
    return np.concatenate([call["waveform"][0] for call in seen.calls])


def test_a_reference_may_start_elsewhere_than_the_vocal(pipe: Pipeline) -> None:
    clip = (sung(RATE_HZ * 2, seed=5), RATE_HZ)
    with pytest.raises(AudioError, match=r"past the end \(2.00 s\); give an earlier reference_start_s \(--ref"):
        heard(pipe, start_s=3, reference=clip)
    whole = heard(pipe, reference=clip)
    assert len(whole) == RATE_HZ * 2
    np.testing.assert_array_equal(heard(pipe, start_s=3, reference=clip, reference_start_s=0.0), whole)
    np.testing.assert_array_equal(heard(pipe, reference=clip, reference_start_s=1.5), whole[RATE_HZ * 3 // 2 :])
    np.testing.assert_array_equal(heard(pipe, start_s=1.5, reference=clip), whole[RATE_HZ * 3 // 2 :])
    song = Song((sung(RATE_HZ * 4), RATE_HZ), reference=clip, start_s=3, reference_start_s=0.0)
    (result,) = pipe.generate_batch([song], params=FAST)
    alone = pipe.generate(song.vocal, reference=clip, start_s=3, reference_start_s=0.0, params=FAST)
    np.testing.assert_array_equal(result.audio, alone.audio)
    with pytest.raises(ParamError, match="start"):
        heard(pipe, reference=clip, reference_start_s=-1.0)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"reference": "missing.wav"}, AudioError, "reference: missing.wav: no such file"),
        ({"reference": (sung(RATE_HZ), RATE_HZ), "start_s": 2}, AudioError, "past the end"),
        ({"text": "lone \ud800"}, ParamError, "lone surrogate"),
    ],
)
def test_wrong_conditions_are_told_before_the_vocal_is_encoded(
    pipe: Pipeline, options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    encoder = pipe._engines["encoder"] = Seen(pipe._engines["encoder"])
    with pytest.raises(kind, match=says):
        pipe.generate((sung(RATE_HZ * 4), RATE_HZ), params=FAST, **options)
    assert encoder.calls == []


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["none.wav"], 3, "vocal: none.wav: no such file"),
        (["vocal.wav", "--reference", "none.wav"], 3, "reference: none.wav: no such file"),
        (["vocal.wav", "--reference-start", "3"], 2, "expected --reference FILE with it"),
    ],
)
def test_the_command_looks_for_its_files_before_it_loads_a_bundle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("vocal.wav", sung(RATE_HZ), RATE_HZ)

    def load(*args: object, **given: object) -> Pipeline:
        raise AssertionError("a bundle was loaded")

    monkeypatch.setattr(Pipeline, "load", load)
    assert cli.run(["generate", *options, "-o", "out.wav"]) == code
    assert says in capfd.readouterr().err


def test_a_redrawn_region_keeps_the_order_of_its_condition(pipe: Pipeline) -> None:
    result = pipe.generate((sung(RATE_HZ * 4), RATE_HZ), text="soul", params=FAST)
    with pytest.raises(ParamError, match="expected prefix_order 'ref,text', the result's own, got 'text,ref'"):
        pipe.regenerate(result, 1, 2, params=replace(FAST, prefix_order="text,ref"))
    assert pipe.regenerate(result, 1, 2, params=FAST).params.prefix_order == "ref,text"


@pytest.mark.parametrize(("start_s", "end_s"), [(3, 5), (0, 1), (13, 14), (7, 9)])
def test_a_region_of_a_long_song_is_drawn_in_sight_of_both_sides(tmp_path: Path, start_s: int, end_s: int) -> None:
    """Wherever it lies: spans of a new song are not what a region of a finished one should be cut by."""
    pipe = stub_pipeline(tmp_path / "short", max_seconds=4)
    max_codes = 101
    result = pipe.generate((sung(RATE_HZ * 15), RATE_HZ), params=FAST, long=True)
    assert (0, max_codes) in spans(len(result.codes), max_codes)
    seen = pipe._engines["denoiser"] = Seen(StubDenoiser())
    again = pipe.regenerate(result, start_s, end_s)
    first, stop = start_s * 25, end_s * 25
    assert len(seen.calls) == FAST.steps
    rows, codes = seen.calls[0]["rows"], seen.calls[0]["codes"][0]
    assert len(codes) == max_codes
    n_before, n_after = int(rows[0]), len(codes) - 1 - int(rows[-1])
    np.testing.assert_array_equal(rows, np.arange(rows[0], rows[-1] + 1))
    assert n_before >= min(first, 25)
    assert n_after >= min(len(result.codes) - stop, 25)
    start = first - n_before
    outside = np.r_[result.codes[start:first], result.codes[stop : start + max_codes]]
    np.testing.assert_array_equal(np.delete(codes, rows), outside)
    np.testing.assert_array_equal(np.delete(again.codes, np.s_[first:stop]), np.delete(result.codes, np.s_[first:stop]))
