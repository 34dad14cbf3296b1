"""Regions drawn anew, saved runs, variations, batches and long songs, with trivial networks."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lada_rt import GenerationCancelled, GenerationParams, ParamError, Pipeline, Progress, Song, load_codes, save_codes
from lada_rt.denoise import denoise
from lada_rt.long_song import spans
from lada_rt.regenerate import SEAM_S
from lada_rt.results import Result
from stubs import GEOMETRY, VOCAB, StubDenoiser, no_threads_left, stub_pipeline, sung

FAST = GenerationParams(steps=3, flow_steps=2)
RATE_HZ = 48_000


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return stub_pipeline(tmp_path)


def check_outside(old: Result, new: Result, start_s: float, end_s: float) -> None:
    """Codes and audio outside the region are the old ones, inside at least some are not."""
    first, last = int(start_s * 25), min(len(old.codes), int(np.ceil(end_s * 25)))
    inside = np.zeros(len(old.codes), bool)
    inside[first:last] = True
    np.testing.assert_array_equal(new.codes[~inside], old.codes[~inside])
    assert (new.codes[inside] != old.codes[inside]).any()
    assert ((new.codes >= 0) & (new.codes < VOCAB)).all()
    low, high = max(0, int((first / 25 - SEAM_S) * RATE_HZ)), int((last / 25 + SEAM_S) * RATE_HZ)
    np.testing.assert_array_equal(new.audio[:, :low], old.audio[:, :low])
    np.testing.assert_array_equal(new.audio[:, high:], old.audio[:, high:])
    assert new.audio.shape == old.audio.shape
    assert not np.array_equal(new.audio[:, low:high], old.audio[:, low:high])


@pytest.mark.parametrize(
    ("start_s", "end_s", "windows"),
    [
        (0.0, 2.0, [0]),
        (1.03, 1.05, [0]),
        (29.0, 30.1, [0]),  # its seam ends before window 1 begins at 30.72 s
        (29.0, 30.5, [0, 1]),  # its seam does not
        (35.0, 38.0, [0, 1]),  # where two windows overlap
        (45.0, 50.0, [1]),
        (45.0, 80.0, [1, 2]),
        (88.0, 90.0, [2]),
        (88.0, 1e6, [2]),
        (0.0, 90.0, [0, 1, 2]),
    ],
)
def test_region(pipe: Pipeline, start_s: float, end_s: float, windows: list[int]) -> None:
    old = pipe.generate((sung(RATE_HZ * 90), RATE_HZ), text="soul", params=FAST)
    before = old.audio.copy()
    solved: list[bytes] = []
    flow = pipe._engines["flow"]

    class Watch:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            solved.append(inputs["codes"].tobytes())
            return flow.run(**inputs)

    pipe._engines["flow"] = Watch()
    new = pipe.regenerate(old, start_s, end_s)
    check_outside(old, new, start_s, end_s)
    np.testing.assert_array_equal(old.audio, before)
    assert len(set(solved)) == len(windows)
    assert len(solved) == len(windows) * FAST.flow_steps
    layer = new.origin.layers[-1]
    assert list(range(layer.first_window, layer.first_window + len(layer.latents))) == windows
    assert new.params.seed == FAST.seed + 1
    assert no_threads_left()


def test_regions_of_regions_and_determinism(pipe: Pipeline) -> None:
    result = pipe.generate((sung(RATE_HZ * 70), RATE_HZ), params=FAST)
    for start_s, end_s in ((10.0, 12.0), (36.0, 37.0), (11.0, 40.0)):
        new = pipe.regenerate(result, start_s, end_s, seed=5)
        again = pipe.regenerate(result, start_s, end_s, seed=5)
        np.testing.assert_array_equal(new.audio, again.audio)
        np.testing.assert_array_equal(new.codes, again.codes)
        assert not np.array_equal(new.codes, pipe.regenerate(result, start_s, end_s, seed=6).codes)
        check_outside(result, new, start_s, end_s)
        result = new


def test_region_of_everything_is_a_new_run(pipe: Pipeline) -> None:
    """Nothing is known, so the codes are those of `generate` with that seed."""
    vocal = (sung(RATE_HZ * 50), RATE_HZ)
    old = pipe.generate(vocal, params=FAST)
    fresh = pipe.generate(vocal, params=dataclasses.replace(FAST, seed=99))
    np.testing.assert_array_equal(pipe.regenerate(old, 0, 60, seed=99).codes, fresh.codes)


def test_untouched_seam_is_a_blend(pipe: Pipeline) -> None:
    """A region whose codes come out as they were changes nothing, so the blend adds nothing of its own."""
    result = pipe.generate((sung(RATE_HZ * 20), RATE_HZ), params=FAST)

    class Same:
        def run(self, *, rows: np.ndarray, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            logits = np.full((len(rows), VOCAB), -100.0, np.float32)
            logits[np.arange(len(rows)), result.codes[rows]] = 100
            return {"logits": logits}

    pipe._engines["denoiser"] = Same()
    new = pipe.regenerate(result, 5, 10)
    np.testing.assert_array_equal(new.codes, result.codes)
    np.testing.assert_array_equal(new.audio, result.audio)


def test_region_counts_run_over_the_region() -> None:
    engine = StubDenoiser()
    known = np.arange(100) % VOCAB
    known[40:60] = VOCAB
    prefix = np.zeros((0, 8), np.float32)
    codes = denoise(engine, np.zeros(100, np.int64), prefix, GenerationParams(steps=4), VOCAB, known=known)
    assert engine.rows_seen[0] == 20
    assert len(engine.rows_seen) == 4
    np.testing.assert_array_equal(codes[:40], known[:40])
    np.testing.assert_array_equal(codes[60:], known[60:])


@pytest.mark.parametrize(
    ("start_s", "end_s"),
    [(5, 5), (6, 5), (-1, 2), (20.1, 30), (float("nan"), 3), (0, float("inf")), ("0", 3), (None, 3), (True, 3)],
)
def test_bad_regions(pipe: Pipeline, start_s: object, end_s: object) -> None:
    result = pipe.generate((sung(RATE_HZ * 20), RATE_HZ), params=FAST)
    with pytest.raises(ParamError):
        pipe.regenerate(result, start_s, end_s)


def test_results_that_do_not_fit(pipe: Pipeline) -> None:
    result = pipe.generate((sung(RATE_HZ), RATE_HZ), params=FAST)
    foreign = dataclasses.replace(result.origin, bundle_sha256="0" * 64)
    for bad in (
        None,
        dataclasses.replace(result, origin=None),
        dataclasses.replace(result, origin=foreign),
        dataclasses.replace(result, audio=result.audio[:, :-1]),
    ):
        with pytest.raises(ParamError):
            pipe.regenerate(bad, 0, 1)
    with pytest.raises(ParamError):
        pipe.regenerate(result, 0, 1, seed=-1)
    with pytest.raises(ParamError):
        pipe.regenerate(result, 0, 1, params="fast")


@pytest.mark.parametrize("stage", ["denoise", "flow", "render"])
def test_region_can_be_cancelled(pipe: Pipeline, stage: str) -> None:
    result = pipe.generate((sung(RATE_HZ * 50), RATE_HZ), params=FAST)
    with pytest.raises(GenerationCancelled):
        pipe.regenerate(result, 20, 40, on_progress=lambda p: p.stage != stage)
    assert no_threads_left()


def test_region_progress_is_complete(pipe: Pipeline) -> None:
    result = pipe.generate((sung(RATE_HZ * 50), RATE_HZ), params=FAST)
    seen: list[Progress] = []
    pipe.regenerate(result, 35, 36, on_progress=seen.append)
    for stage, total in (("denoise", 3), ("flow", 4), ("render", 2)):
        assert [p.step for p in seen if p.stage == stage] == list(range(total + 1))


def test_saved_run_comes_back(pipe: Pipeline, tmp_path: Path) -> None:
    vocal = (sung(RATE_HZ * 70), RATE_HZ)
    result = pipe.generate(vocal, text="soul", params=dataclasses.replace(FAST, schedule=(0.5, 0.2, 0.0)), end_s=60)
    result = pipe.regenerate(result, 30, 45)
    save_codes(tmp_path / "run.npz", result)
    seen: list[Progress] = []
    back = pipe.restore(load_codes(tmp_path / "run.npz"), vocal, on_progress=seen.append)
    assert len(result.origin.layers) == 2
    rendered = [p for p in seen if p.stage == "render"]
    assert [p.step for p in rendered] == list(range(rendered[-1].total + 1))
    np.testing.assert_array_equal(back.audio, result.audio)
    np.testing.assert_array_equal(back.codes, result.codes)
    assert back.params == result.params
    ours, theirs = (pipe.regenerate(r, 40, 50, seed=3) for r in (result, back))
    np.testing.assert_array_equal(ours.audio, theirs.audio)
    np.testing.assert_array_equal(ours.codes, theirs.codes)


def test_saved_run_wants_its_own_vocal_and_bundle(pipe: Pipeline, tmp_path: Path) -> None:
    vocal = sung(RATE_HZ * 3)
    save_codes(tmp_path / "run.npz", pipe.generate((vocal, RATE_HZ), params=FAST))
    saved = load_codes(tmp_path / "run.npz")
    for other in (vocal * np.float32(0.5), vocal[:-5000], np.stack([vocal, vocal])):
        with pytest.raises(ParamError, match="vocal"):
            pipe.restore(saved, (other, RATE_HZ))
    (tmp_path / "other").mkdir()
    other_pipe = stub_pipeline(tmp_path / "other", name="another")
    with pytest.raises(ParamError, match="bundle"):
        other_pipe.restore(saved, (vocal, RATE_HZ))


def saved_parts(pipe: Pipeline, path: Path) -> dict[str, np.ndarray]:
    save_codes(path, pipe.generate((sung(RATE_HZ * 3), RATE_HZ), params=FAST))
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def with_meta(parts: dict[str, np.ndarray], **changes: object) -> dict[str, np.ndarray]:
    meta = json.loads(parts["meta"].tobytes()) | changes
    return parts | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}


def test_damaged_codes_files(pipe: Pipeline, tmp_path: Path) -> None:
    """Whatever the file holds, the answer is a ParamError, at the latest when it meets the bundle."""
    path = tmp_path / "run.npz"
    parts = saved_parts(pipe, path)
    whole = path.read_bytes()
    meta = json.loads(parts["meta"].tobytes())
    latents, codes = parts["latents"], parts["codes"]
    cases: list[dict[str, np.ndarray] | bytes] = [
        b"",
        b"not a zip",
        whole[:-100],
        whole[: len(whole) // 2],
        whole.replace(codes.tobytes()[:40], bytes(40)),  # its checksum is wrong
        {k: v for k, v in parts.items() if k != "prefix"},
        parts | {"extra": codes},
        parts | {"codes": codes.astype(np.int64)},
        parts | {"codes": codes[:, None]},
        parts | {"codes": codes[:-1]},
        parts | {"codes": codes[:0]},
        parts | {"codes": codes + VOCAB},
        parts | {"codes": -1 - codes},
        parts | {"codes": np.array([object()] * 3)},
        parts | {"vocal_codes": parts["vocal_codes"][:-1]},
        parts | {"vocal_codes": parts["vocal_codes"] + VOCAB},
        parts | {"vocal_codes": -1 - parts["vocal_codes"]},
        whole.replace(b"'fortran_order'", b"'fortran_order\\"),  # a header that is no Python
        whole.replace(b"(1, ", b"(1( "),
        parts | {"prefix": np.zeros((3, 8), np.float32)},
        parts | {"prefix": np.zeros((1, 9), np.float32)},
        parts | {"prefix": np.full((1, 8), np.nan, np.float32)},
        parts | {"latents": latents[:, :, :-1]},
        parts | {"latents": np.asfortranarray(latents)},
        parts | {"latents": latents * np.float32(np.inf)},
        parts | {"latents": np.concatenate([latents, latents])},
        parts | {"meta": np.frombuffer(b"[]", np.uint8)},
        parts | {"meta": np.frombuffer(b"{", np.uint8)},
        parts | {"meta": np.frombuffer(b"[" * 200_000, np.uint8)},
        with_meta(parts, format="else"),
        with_meta(parts, format_version=2),
        with_meta(parts, params={"steps": 0}),
        with_meta(parts, params={"unknown": 0}),
        with_meta(parts, params=3),
        with_meta(parts, layers=[]),
        with_meta(parts, layers=[[0, 2, 0, 10]]),
        with_meta(parts, layers=[[0, 1, 0, 10]]),
        with_meta(parts, layers=[[7, 1, *meta["layers"][0][2:]]]),
        with_meta(parts, layers=[[0, 1, 5, 5]]),
        with_meta(parts, layers=[[0, -1, 0, 5]]),
        with_meta(parts, layers=[[0, 1, 0, 10**12]]),
        with_meta(parts, layers=3),
        with_meta(parts, flow_seed=-1),
        with_meta(parts, flow_seed="1"),
        with_meta(parts, start_s="0"),
        with_meta(parts, end_s=[]),
        with_meta(parts, start_s=10**400),
        with_meta(parts, params={"temperature": 10**400}),
        with_meta(parts, long=1),
        with_meta(parts, vocal_sha256=None),
    ]
    for number, case in enumerate(cases):
        if isinstance(case, bytes):
            path.write_bytes(case)
        else:
            np.savez(path, **case)
        with pytest.raises(ParamError) as caught:
            pipe.restore(load_codes(path), (sung(RATE_HZ * 3), RATE_HZ))
        assert "\n" not in str(caught.value), number
    np.savez_compressed(path, **parts)
    with pytest.raises(ParamError, match="compressed"):
        load_codes(path)
    with pytest.raises(ParamError, match="no such file"):
        load_codes(tmp_path / "none.npz")
    with pytest.raises(ParamError):
        load_codes(tmp_path)


def test_codes_file_cannot_claim_a_huge_array(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    parts = saved_parts(pipe, path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in parts.items():
            body = io.BytesIO()
            np.save(body, array)
            archive.writestr(f"{name}.npy", header.getvalue() if name == "codes" else body.getvalue())
    with pytest.raises(ParamError, match="codes"):
        load_codes(path)


def test_batch_gives_the_bytes_of_single_runs(pipe: Pipeline) -> None:
    songs = [
        Song((sung(RATE_HZ * 50), RATE_HZ), text="soul"),
        (sung(1, seed=1), RATE_HZ),
        Song((sung(RATE_HZ * 3, seed=2), RATE_HZ), start_s=1, reference=(sung(RATE_HZ * 2), RATE_HZ)),
    ]
    results = list(pipe.generate_batch(songs, params=FAST, variations=2))
    assert len(results) == 6
    for index, result in enumerate(results):
        song = songs[index // 2] if isinstance(songs[index // 2], Song) else Song(songs[index // 2])
        params = dataclasses.replace(FAST, seed=FAST.seed + index % 2)
        alone = pipe.generate(song.vocal, text=song.text, reference=song.reference, start_s=song.start_s, params=params)
        np.testing.assert_array_equal(result.audio, alone.audio)
        np.testing.assert_array_equal(result.codes, alone.codes)
        assert result.params == params
    new = pipe.regenerate(results[1], 10, 12)
    check_outside(results[1], new, 10, 12)


def test_variations_share_what_they_can(pipe: Pipeline) -> None:
    calls: dict[str, int] = {}

    class Count:
        def __init__(self, name: str, engine: object) -> None:
            self.name, self.engine = name, engine

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            calls[self.name] = calls.get(self.name, 0) + 1
            return self.engine.run(**inputs)

    for name, engine in list(pipe._engines.items()):
        pipe._engines[name] = Count(name, engine)
    song = Song((sung(RATE_HZ), RATE_HZ), text="soul", reference=(sung(RATE_HZ), RATE_HZ))
    results = list(pipe.generate_batch([song], params=FAST, variations=4))
    assert len({r.audio.tobytes() for r in results}) == 4
    assert [r.params.seed for r in results] == [13, 14, 15, 16]
    assert (calls["encoder"], calls["text_encoder"], calls["ref_encoder"]) == (1, 1, 1)
    assert calls["denoiser"] == FAST.steps * 4 - 3
    last = list(pipe.generate_batch([song], params=dataclasses.replace(FAST, seed=2**64 - 1), variations=2))
    assert last[1].params.seed == 0


def test_bad_batches(pipe: Pipeline) -> None:
    for songs in (None, 3, "vocal.wav", (sung(10), RATE_HZ)):
        with pytest.raises(ParamError):
            pipe.generate_batch(songs)
    for variations in (0, -1, 1.5, True, "2"):
        with pytest.raises(ParamError):
            pipe.generate_batch([], variations=variations)
    with pytest.raises(ParamError):
        list(pipe.generate_batch([None]))


@pytest.mark.parametrize("max_codes", [1, 2, 7, 40, 100])
def test_spans_cover_the_song(max_codes: int) -> None:
    for n_codes in (1, 2, 7, 39, 40, 41, 70, 71, 100, 101, 333):
        found = spans(n_codes, max_codes)
        assert found[0][0] == 0
        assert found[-1][1] == n_codes
        assert all(stop - start == min(max_codes, n_codes) for start, stop in found)
        for (_, stop), (start, next_stop) in itertools.pairwise(found):
            assert stop < next_stop
            assert stop - start >= int(max_codes * 0.25)


class SeenDenoiser(StubDenoiser):
    """Keeps what the denoiser saw."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append((inputs["vocal_codes"][0], inputs["codes"][0].copy(), inputs["rows"]))
        return super().run(**inputs)


def test_long_song(tmp_path: Path) -> None:
    pipe = stub_pipeline(tmp_path, max_seconds=4)
    seen = pipe._engines["denoiser"] = SeenDenoiser()
    vocal = (sung(RATE_HZ * 15), RATE_HZ)
    steps: list[Progress] = []
    result = pipe.generate(vocal, params=FAST, long=True, on_progress=steps.append)
    found = spans(len(result.codes), 101)
    assert len(found) == 5
    assert [p.step for p in steps if p.stage == "denoise"] == list(range(5 * FAST.steps + 1))
    assert len(seen.calls) == 5 * FAST.steps
    drawn_to = 0
    for number, (start, stop) in enumerate(found):
        for vocal_codes, codes, rows in seen.calls[number * FAST.steps : (number + 1) * FAST.steps]:
            assert len(codes) == len(vocal_codes) == 101
            np.testing.assert_array_equal(vocal_codes, result.origin.vocal_codes[start:stop])
            # What the span before has drawn is known here, and is what the song ends up with.
            np.testing.assert_array_equal(codes[: drawn_to - start], result.codes[start:drawn_to])
            assert rows.min() >= drawn_to - start
        drawn_to = stop
    chunks = list(pipe.stream(vocal, params=FAST, long=True))
    np.testing.assert_array_equal(np.concatenate([c.samples for c in chunks], axis=1), result.audio)
    check_outside(result, pipe.regenerate(result, 2, 9), 2, 9)
    save_codes(tmp_path / "long.npz", result)
    np.testing.assert_array_equal(pipe.restore(load_codes(tmp_path / "long.npz"), vocal).audio, result.audio)


def test_long_is_no_change_for_a_song_that_fits(pipe: Pipeline) -> None:
    vocal = (sung(RATE_HZ * 5), RATE_HZ)
    ours, theirs = (pipe.generate(vocal, params=FAST, long=long) for long in (False, True))
    np.testing.assert_array_equal(ours.audio, theirs.audio)


def test_long_spans_do_not_repeat_each_others_noise(tmp_path: Path) -> None:
    """A vocal and logits that are the same everywhere still give codes that differ from span to span."""
    pipe = stub_pipeline(tmp_path, max_seconds=4)

    class Flat:
        def run(self, *, rows: np.ndarray, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": np.zeros((len(rows), VOCAB), np.float32)}

    pipe._engines["denoiser"] = Flat()
    codes = pipe.generate((np.zeros(RATE_HZ * 15, np.float32), RATE_HZ), params=FAST, long=True).codes
    hop = spans(len(codes), 101)[1][0]
    assert (codes[:100] == codes[hop : hop + 100]).mean() < 0.2
    assert GEOMETRY.n_codes(RATE_HZ * 15) == len(codes)
