"""`generate --variations`: names, equality with single runs, what is refused, what an end half-way leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lada_rt import Pipeline, cli
from stubs import stub_pipeline, sung

FAST = ["--steps", "2", "--flow-steps", "1", "--guidance", "1"]


@pytest.fixture
def pipe(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    pipe = stub_pipeline(tmp_path_factory.mktemp("stub"))
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *args, **options: pipe))
    return pipe


@pytest.fixture
def vocal(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "vocal.wav", sung(48_000 * 2), 48_000)
    return folder / "vocal.wav"


def generate(vocal: Path, out: object, *options: object) -> int:
    return cli.run([str(a) for a in ("generate", vocal, "-o", out, "--text", "soul", *FAST, *options)])


@pytest.mark.parametrize(("first", "seeds"), [(7, (7, 8, 9)), (2**64 - 2, (2**64 - 2, 2**64 - 1, 0))])
def test_each_equals_a_single_run(
    tmp_path: Path, pipe: Pipeline, vocal: Path, capfd: pytest.CaptureFixture[str], first: int, seeds: tuple[int, ...]
) -> None:
    several = tmp_path / "several"
    several.mkdir()
    files = ["--json", several / "r.json", "--save-codes", several / "c.npz"]
    assert generate(vocal, several / "band.flac", "--seed", first, "--variations", 3, *files) == 0
    printed = capfd.readouterr().out
    names = [f"{stem}-seed{seed}{suffix}" for stem, suffix in (("band", ".flac"), ("c", ".npz"), ("r", ".json"))
             for seed in seeds]  # fmt: skip
    assert sorted(path.name for path in several.iterdir()) == sorted(names)
    assert [line for line in printed.splitlines() if line.endswith(".flac")] == [
        str(several / f"band-seed{seed}.flac") for seed in seeds
    ]
    audio = []
    for seed in seeds:
        alone = tmp_path / f"{seed}.flac"
        assert generate(vocal, alone, "--seed", seed) == 0
        found, wanted = (soundfile.read(f, dtype="int16")[0] for f in (several / f"band-seed{seed}.flac", alone))
        np.testing.assert_array_equal(found, wanted)
        audio.append(found)
        report = json.loads((several / f"r-seed{seed}.json").read_text())
        assert report["seed"] == report["params"]["seed"] == seed
        assert report["out"] == str(several / f"band-seed{seed}.flac")
        again = tmp_path / f"{seed}-again.flac"
        assert cli.run(["generate", str(vocal), "-o", str(again), "--keep", str(several / f"c-seed{seed}.npz")]) == 0
        np.testing.assert_array_equal(soundfile.read(again, dtype="int16")[0], wanted)
    assert (audio[0] != audio[1]).any()
    assert (audio[1] != audio[2]).any()


def test_the_vocal_is_encoded_once(
    tmp_path: Path, pipe: Pipeline, vocal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for stage in ("encoder", "text_encoder", "denoiser"):
        engine = pipe._engines[stage]

        class Counted:
            def run(self, *, stage: str = stage, engine: object = engine, **inputs: np.ndarray) -> object:
                calls.append(stage)
                return engine.run(**inputs)  # type: ignore[attr-defined]

        monkeypatch.setitem(pipe._engines, stage, Counted())
    assert generate(vocal, tmp_path / "o.wav", "--variations", 3) == 0
    # two steps for each, the first of them shared
    assert {stage: calls.count(stage) for stage in set(calls)} == {"encoder": 1, "text_encoder": 1, "denoiser": 4}


def test_one_variation_keeps_the_name(tmp_path: Path, pipe: Pipeline, vocal: Path) -> None:
    assert generate(vocal, tmp_path / "o.wav", "--variations", 1) == 0
    assert (tmp_path / "o.wav").exists()


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("-", ["--variations", "2"]),
        ("o.wav", ["--variations", "0"]),
        ("o.wav", ["--variations", "-1"]),
        ("o.wav", ["--variations", "1025"]),
        ("o.wav", ["--variations", "two"]),
        ("o.wav", ["--variations", "2", "--keep", "c.npz"]),
        ("o.wav", ["--variations", "2", "--keep", "c.npz", "--redo", "0:1"]),
        ("blocked.wav", ["--variations", "2"]),
    ],
)
def test_refused_before_any_work(
    tmp_path: Path, pipe: Pipeline, vocal: Path, capfd: pytest.CaptureFixture[str], out: str, options: list[str]
) -> None:
    """Also when only the last of the files could not be written."""
    (tmp_path / "blocked-seed14.wav").mkdir()
    assert cli.run(["generate", str(vocal), "-o", out if out == "-" else str(tmp_path / out), *options]) == 2
    printed, messages = capfd.readouterr()
    assert printed == ""
    assert messages.count("\n") == 1
    assert ("blocked-seed14.wav: cannot be written" if out == "blocked.wav" else "--variations") in messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked-seed14.wav", "in"]


def test_the_vocal_itself_is_no_output(tmp_path: Path, pipe: Pipeline, vocal: Path) -> None:
    own = vocal.rename(vocal.with_name("band-seed14.wav"))
    before = own.read_bytes()
    assert generate(own, vocal.with_name("band.wav"), "--variations", 2) == 2
    assert own.read_bytes() == before


def test_an_interrupt_leaves_what_is_complete(
    tmp_path: Path, pipe: Pipeline, vocal: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, calls = pipe._engines["flow"], []

    class Interrupted:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            calls.append(1)
            if len(calls) == 2:  # the second song: one window, one step each
                raise KeyboardInterrupt
            return flow.run(**inputs)

    monkeypatch.setitem(pipe._engines, "flow", Interrupted())
    out = tmp_path / "out"
    out.mkdir()
    assert generate(vocal, out / "o.wav", "--variations", 3, "--json", out / "r.json") == 130
    assert capfd.readouterr().err.splitlines()[-1] == "lada-rt: interrupted"
    assert sorted(path.name for path in out.iterdir()) == ["o-seed13.wav", "r-seed13.json"]
