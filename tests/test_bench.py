"""`lada-rt bench`: metrics on signals with known answers, checks that catch wrong engines, picture."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lada_rt import cli
from lada_rt.bench import machine, measure, quality
from lada_rt.bench.check import Recorder, check_run
from lada_rt.bench.command import numbers
from lada_rt.bench.compare import read_report
from lada_rt.bench.difference import relative_error
from lada_rt.bench.graph_sizes import bundle_sizes, read_shapes
from lada_rt.bench.measure import BenchOptions, run_bench, stage_seconds, sung_vocal
from lada_rt.bench.report import STAGES, draw, print_report
from lada_rt.bench.roofline import FlowSizes, Peaks
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.errors import EngineError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from stubs import stub_engines, sung, write_stub_bundle

RATE = 48_000


def tone(midi: float, seconds: float = 2.0, level: float = 0.3) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t)).astype(np.float32)


def bursts(times_s: list[float], seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.zeros(round(seconds * RATE), np.float32)
    for time_s in times_s:
        start = round(time_s * RATE)
        n = min(6000, len(out) - start)
        out[start : start + n] += (0.5 * rng.standard_normal(n) * np.exp(-np.arange(n) / 1500)).astype(np.float32)
    return out


# quality


def test_token_agreement() -> None:
    assert quality.token_agreement(np.array([1, 2, 3, 4]), np.array([1, 0, 3, 0])) == 0.5
    with pytest.raises(ParamError, match="token agreement"):
        quality.token_agreement(np.array([1]), np.array([1, 2]))


def test_agreement_per_step_follows_the_commits() -> None:
    rows = [np.arange(5), np.array([1, 3, 4]), np.array([1, 3, 4]), np.array([3])]
    codes, reference = np.array([7, 8, 9, 10, 11]), np.array([7, 8, 0, 10, 0])
    # step 0 commits 0 and 2, step 1 nothing, step 2 commits 1 and 4, the last step position 3
    assert quality.agreement_per_step(rows, codes, reference) == [0.5, None, 0.5, 1.0]


def test_stft_distance_of_known_changes() -> None:
    rng = np.random.default_rng(1)
    signal = (0.2 * rng.standard_normal((2, RATE))).astype(np.float32)
    assert quality.stft_distance(signal, signal) == 0.0
    # half the level: spectral convergence 1/2, log difference ln 2 (no bin of this noise falls under -80 dB)
    assert quality.stft_distance(signal / 2, signal) == pytest.approx(0.5 + np.log(2), abs=0.01)
    near = signal + 0.001 * rng.standard_normal(signal.shape).astype(np.float32)
    far = signal + 0.1 * rng.standard_normal(signal.shape).astype(np.float32)
    assert 0 < quality.stft_distance(near, signal) < quality.stft_distance(far, signal)
    with pytest.raises(ParamError, match="equal shapes"):
        quality.stft_distance(signal, signal[:, 1:])


@pytest.mark.parametrize("midi", [48, 60, 61, 66, 69, 71, 83])
def test_chroma_of_a_tone_is_its_pitch_class(midi: int) -> None:
    profile = quality.chroma(tone(midi), RATE)[2:-4]
    assert (profile.argmax(axis=1) == midi % 12).all()
    assert profile.max() == pytest.approx(1)
    others = np.delete(profile, midi % 12, axis=1)
    assert others.max() < 0.3


def test_chroma_ignores_level_and_silence() -> None:
    assert (quality.chroma(np.zeros(RATE, np.float32), RATE) == 0).all()
    loud, quiet = quality.chroma(tone(64), RATE), quality.chroma(tone(64, level=0.003), RATE)
    np.testing.assert_allclose(loud, quiet, atol=1e-3)


def test_chroma_similarity() -> None:
    assert quality.chroma_similarity(tone(60), tone(72), RATE) == pytest.approx(1, abs=0.02)  # an octave
    assert quality.chroma_similarity(tone(60), tone(66), RATE) == pytest.approx(0, abs=0.02)  # a tritone
    assert quality.chroma_similarity(tone(60), np.zeros(RATE, np.float32), RATE) is None
    fifth = quality.chroma_similarity(tone(60) + tone(67), tone(60), RATE)
    assert fifth == pytest.approx(2**-0.5, abs=0.05)  # cosine of (1, 1) and (1, 0)


def test_onsets_of_bursts() -> None:
    times = [0.0, 0.5, 1.0, 1.37, 2.0, 2.6]
    found = quality.onsets(bursts(times, 3.0), RATE)
    assert len(found) == len(times)
    np.testing.assert_allclose(found, times, atol=0.015)
    assert quality.onset_f1(found, np.array(times)) == 1.0


def test_onset_f1_counts_matches_within_50_ms() -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    assert quality.onset_f1(truth + 0.049, truth) == 1.0
    assert quality.onset_f1(truth + 0.051, truth) == 0.0
    # two of four found, one false: precision 2/3, recall 1/2
    assert quality.onset_f1(np.array([1.0, 2.0, 2.5]), truth) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert quality.onset_f1(np.array([]), truth) == 0.0


def test_without_mir_eval_onset_f1_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mir_eval.onset", None)
    found = quality.against_vocal(tone(60), tone(60), RATE)
    assert found["onset_f1"] is None
    assert found["chroma_similarity"] == pytest.approx(1)


def test_silence_has_no_onsets() -> None:
    assert len(quality.onsets(np.zeros(RATE, np.float32), RATE)) == 0


# the check


def recorded_run(
    folder: Path, engines: dict[str, Any] | None = None, steps: int = 3, seconds: float = 2.0
) -> tuple[Any, ...]:
    bundle = Bundle.open(write_stub_bundle(folder / "check.bundle"))
    params = GenerationParams(steps=steps, flow_steps=3)
    recorder = Recorder(engines or stub_engines(), steps, 3)
    pipeline = Pipeline(bundle, recorder.engines, backend="stub", device="cpu")
    result = pipeline.generate((sung(round(seconds * RATE)), RATE), text="soul", params=params)
    return bundle, recorder, params, result.codes, result.audio


class StubReference:
    def __call__(self, stage: str, inputs: Any) -> dict[str, np.ndarray]:
        return stub_engines()[stage].run(**inputs)  # type: ignore[attr-defined]  # stubs are plain objects

    def release(self) -> None:
        pass


stub_reference = StubReference()


def test_a_right_run_passes(tmp_path: Path) -> None:
    errors = check_run(*recorded_run(tmp_path), stub_reference)
    stages = {"encoder", "text_encoder", "denoiser", "flow", "mel_decoder", "vocoder"}
    between = {"schedule", "nucleus", "euler", "window", "second window", "context", "seam", "right channel", "form"}
    assert set(errors) == stages | between
    assert max(errors.values()) < 1e-5


def test_a_right_run_of_two_windows_passes(tmp_path: Path) -> None:
    bundle, recorder, params, codes, audio = recorded_run(tmp_path, seconds=50)
    assert set(recorder.calls["flow"]) == {0, 1, 2, 3}
    assert set(recorder.calls["mel_decoder"]) == {0, 1, 2}
    assert max(check_run(bundle, recorder, params, codes, audio, stub_reference).values()) < 1e-5


def test_a_wrong_second_window_is_found(tmp_path: Path) -> None:
    bundle, recorder, params, codes, audio = recorded_run(tmp_path, seconds=50)

    def refused(name: str) -> Any:
        return pytest.raises(EngineError, match=f"check: {name} differs")

    hop = bundle.geometry.hop_samples
    hard_cut = audio.copy()  # the first window to its end, then the second
    hard_cut[0, hop:] *= np.linspace(1, 0.9, audio.shape[1] - hop).astype(np.float32)
    with refused("seam"):
        check_run(bundle, recorder, params, codes, hard_cut, stub_reference)
    with refused("right channel"):
        check_run(bundle, recorder, params, codes, np.stack([audio[0], audio[0]]), stub_reference)
    inputs, outputs = recorder.calls["flow"][3]
    for name, change in (("context", np.zeros_like(inputs["context"])), ("codes", np.roll(inputs["codes"], 1))):
        recorder.calls["flow"][3] = ({**inputs, name: change}, outputs)
        with refused("flow|context|second window"):
            check_run(bundle, recorder, params, codes, audio, stub_reference)
        recorder.calls["flow"][3] = ({**inputs, name: change}, StubReference()("flow", {**inputs, name: change}))
        with refused("context" if name == "context" else "second window"):
            check_run(bundle, recorder, params, codes, audio, stub_reference)


class Wrong:
    """An engine whose one output is off by a little more than it may be."""

    def __init__(self, engine: Any, change: Any) -> None:
        self._engine, self._change = engine, change

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._change(value) for name, value in self._engine.run(**inputs).items()}


@pytest.mark.parametrize("stage", ["encoder", "text_encoder", "denoiser", "flow", "mel_decoder", "vocoder"])
def test_a_wrong_engine_is_never_timed(tmp_path: Path, stage: str) -> None:
    def change(value: np.ndarray) -> np.ndarray:
        return (value + 1) % 64 if value.dtype.kind == "i" else (value * np.float32(1.01)).astype(np.float32)

    engines = stub_engines()
    engines[stage] = Wrong(engines[stage], change)
    with pytest.raises(EngineError, match=rf"check: .*{stage}.* differs from the reference"):
        check_run(*recorded_run(tmp_path, engines), stub_reference)


def test_wrong_codes_and_audio_are_found(tmp_path: Path) -> None:
    bundle, recorder, params, codes, audio = recorded_run(tmp_path)
    with pytest.raises(EngineError, match="check: form"):
        check_run(bundle, recorder, params, codes, audio[:, :-1], stub_reference)
    shifted = np.roll(audio, 480, axis=1)
    with pytest.raises(EngineError, match="check: vocoder"):
        check_run(bundle, recorder, params, codes, shifted, stub_reference)
    other_codes = codes.copy()
    other_codes[recorder.rows[-1][0]] += 1 if codes[recorder.rows[-1][0]] == 0 else -1
    with pytest.raises(EngineError, match=r"check: (window|nucleus)"):
        check_run(bundle, recorder, params, other_codes, audio, stub_reference)
    broken = copy.copy(recorder)
    broken.rows = [recorder.rows[0], recorder.rows[1][1:], *recorder.rows[2:]]
    with pytest.raises(EngineError, match="check: schedule"):
        check_run(bundle, broken, params, codes, audio, stub_reference)


def test_a_token_outside_the_nucleus_is_found(tmp_path: Path) -> None:
    bundle, recorder, params, codes, audio = recorded_run(tmp_path, steps=1)
    logits = recorder.calls["denoiser"][0][1]["logits"]
    wrong = codes.copy()
    wrong[5] = logits[5].argmin()
    with pytest.raises(EngineError, match="check: nucleus"):
        check_run(bundle, recorder, params, wrong, audio, stub_reference)


def test_relative_error() -> None:
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.array([1, 2]), np.array([1, 3])) == 0.5
    assert relative_error(np.array([1.0]), np.array([1.0, 2.0])) == np.inf
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.array([1e-6]), np.zeros(1)) > 1  # nothing is near what should be silent


# the whole, on stubs


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`run_bench` on stub engines: the machinery without the networks."""
    monkeypatch.setattr(measure, "load_engines", lambda bundle, **options: (stub_engines(), "stub", "cpu"))
    monkeypatch.setattr(measure, "OnnxReference", lambda bundle: stub_reference)
    return write_stub_bundle(tmp_path / "stub.bundle")


OPTIONS = BenchOptions(steps=(2, 5), seconds=(1.0, 50.0), repeat=2, flow_steps=2)


def test_report(stubbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    report = run_bench(stubbed, OPTIONS, peaks=Peaks(1e12, 1e10), log=lines.append)
    assert json.loads(json.dumps(report)) == report
    assert [(row["seconds"], row["steps"]) for row in report["rows"]] == [(1, 2), (1, 5), (50, 2), (50, 5)]
    assert len(lines) == 4
    for row in report["rows"]:
        assert row["rtf"] == pytest.approx(row["total_s"] / row["audio_s"], rel=1e-3)
        assert 0 < row["ttfa_s"] <= row["total_s"]
        assert set(row["stages"]) == set(STAGES)
        assert len(row["runs_s"]) == 2
        for values in (row["percentiles"]["rtf"], row["percentiles"]["ttfa_s"]):
            assert values["20"] <= values["50"] <= values["80"]
        assert row["percentiles"]["rtf"]["50"] == row["rtf"]
        assert row["peak_rss_mb"] > 10
        assert row["checked"]["form"] == 0
        assert len(row["quality"]["against_reference"]["token_agreement_per_step"]) == row["steps"]
    best = [row for row in report["rows"] if row["steps"] == 5]
    assert all(row["quality"]["against_reference"]["token_agreement"] == 1 for row in best)
    assert all(row["quality"]["against_reference"]["stft_distance"] == 0 for row in best)
    assert "mean nothing" in report["untrained"]
    assert {"machine", "versions", "commit", "options", "load_s", "first_run_s"} <= set(report)
    print_report(report)
    printed = capsys.readouterr().out
    assert "RTF" in printed
    assert "mean nothing" in printed
    assert "loop on the device" not in printed
    joined = copy.deepcopy(report)
    joined["rows"][0]["stages"] |= {"mel_decoder": 1.0, "vocoder": 0.0}
    print_report(joined)
    assert "the vocoder runs in the mel decoder's loop on the device" in capsys.readouterr().out
    draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stage_seconds_add_up_to_the_run(stubbed: Path) -> None:
    bundle = Bundle.open(stubbed)
    pipeline = Pipeline(bundle, stub_engines(), backend="stub", device="cpu")
    timings = pipeline.generate((sung(RATE), RATE), text="", params=GenerationParams(steps=2, flow_steps=2)).timings
    total = sum(stage_seconds(timings).values())
    assert total == pytest.approx(timings.total_s, rel=0.1, abs=0.005)


def test_a_run_that_differs_from_the_checked_one_is_refused(stubbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting:
        def __init__(self, engine: Any) -> None:
            self._engine, self._n = engine, 0

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            self._n += 1
            return {
                name: value + np.float32(1e-4 * (self._n > 4)) for name, value in self._engine.run(**inputs).items()
            }

    engines = stub_engines()
    engines["mel_decoder"] = Drifting(engines["mel_decoder"])
    monkeypatch.setattr(measure, "load_engines", lambda bundle, **options: (engines, "stub", "cpu"))
    with pytest.raises(EngineError, match="repeat the checked one"):
        run_bench(stubbed, BenchOptions(steps=(2,), seconds=(1.0,), repeat=2, flow_steps=1, quality=False))


class FakeOpponent:
    """Takes three times as long for everything."""

    name = "fake"

    def __init__(self, bundle: Bundle) -> None:
        self.calls: list[str] = []

    def check(self, *args: Any) -> dict[str, float]:
        self.calls.append("check")
        return {"audio": 0.0}

    def run(self, *args: Any) -> dict[str, float]:
        self.calls.append("run")
        return dict.fromkeys([*STAGES, "total"], 3.0)


def test_ratios_are_opponent_over_runtime(stubbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[FakeOpponent] = []

    def opponent(bundle: Bundle) -> FakeOpponent:
        made.append(FakeOpponent(bundle))
        return made[0]

    options = BenchOptions(steps=(2, 5), seconds=(1.0,), repeat=2, flow_steps=2, quality=False)
    report = run_bench(stubbed, options, opponent=opponent)
    assert made[0].calls == ["check", "run", "run"] * 2  # checked before it is timed, in every configuration
    assert set(report["ratios"]) == {*STAGES, "total"}
    for row in report["rows"]:
        assert row["checked"]["fake: audio"] == 0
        assert row["ratios"]["flow"] == pytest.approx(3 / row["stages"]["flow"], rel=1e-3)
        assert row["ratios"]["total"] == pytest.approx(3 / row["total_s"], rel=1e-3)
    print_report(report)
    assert "seconds of fake over those of lada-rt" in capsys.readouterr().out


# options, vocal, sizes


@pytest.mark.parametrize(
    "options",
    [{"steps": ()}, {"steps": (8, 8)}, {"seconds": (0.0,)}, {"repeat": 0}, {"flow_steps": 0}, {"steps": (20_000,)}],
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParamError):
        BenchOptions(**options)


@pytest.mark.parametrize("seconds", [(1.0, 361.0), (1.0, 1e-6), (1.0, 1.000001)])
def test_lengths_are_checked_before_anything_is_measured(stubbed: Path, seconds: tuple[float, ...]) -> None:
    lines: list[str] = []
    with pytest.raises(ParamError, match="--seconds: expected different lengths from 1 sample to the bundle's 360 s"):
        run_bench(stubbed, BenchOptions(steps=(2,), seconds=seconds, repeat=1), log=lines.append)
    assert lines == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--json r.json --plot r.json", "--plot: r.json is also --json"),
        ("--json stats.npz --fad-model m --fad-rate 16000 --fad-reference stats.npz", "--json: stats.npz is an input"),
        ("--plot weights --checkpoint weights", "--plot: weights is an input"),
    ],
)
def test_reports_overwrite_no_input_nor_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stats.npz", "weights"):
        (tmp_path / name).write_text("kept")
    assert cli.run(["bench", *options.split()]) == 2
    messages = capfd.readouterr().err
    assert says in messages
    assert messages.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"stats.npz": "kept", "weights": "kept"}


def test_memory_is_counted_once_what_the_checks_left_is_given_back(
    stubbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "return_freed", lambda: order.append("given back"))
    monkeypatch.setattr(measure.machine, "reset_peak_rss", lambda: order.append("count"))
    run_bench(stubbed, BenchOptions(steps=(2,), seconds=(1.0,), repeat=1, flow_steps=1, quality=False))
    assert order == ["given back", "count"]


def test_bandwidth_is_that_of_all_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copyto = np.copyto
    monkeypatch.setattr(machine, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "MATMUL_SIZE", 16)
    monkeypatch.setattr(machine, "COPY_BYTES", 8 * 1001)
    monkeypatch.setattr(machine, "PEAK_RUNS", 1)
    monkeypatch.setattr(np, "copyto", lambda to, of: copied.append(len(of)) or copyto(to, of))
    assert machine.measure_peaks().bytes_per_s > 0
    assert sorted(copied) == [250, 250, 250, 251]


def test_numbers() -> None:
    assert numbers("--steps", "8,20") == (8, 20)
    with pytest.raises(ParamError, match="--steps"):
        numbers("--steps", "8;20")


@pytest.mark.parametrize("seconds", [0.5, 3.3, 6.0])
def test_sung_vocal_has_the_length_asked_for_and_repeats(seconds: float) -> None:
    vocal, made_by = sung_vocal(seconds, 13, RATE)
    assert vocal.shape == (1, round(seconds * RATE))
    assert vocal.dtype == np.float32
    assert 0.01 < np.abs(vocal).max() <= 1
    assert "seed 13" in made_by
    np.testing.assert_array_equal(vocal, sung_vocal(seconds, 13, RATE)[0])


def test_sizes_come_from_the_graphs() -> None:
    demo = pytest.importorskip("lada_rt_export.demo.training.sizes").PRESETS["demo"]
    sizes = bundle_sizes(Bundle.open(demo_bundle_path()))
    denoiser, flow, vocoder = demo.predictor, demo.flow, demo.vocoder
    assert sizes.denoiser is not None
    assert (sizes.denoiser.hidden, sizes.denoiser.n_layers) == (denoiser.hidden_size, denoiser.n_layers)
    assert sizes.denoiser.intermediate == denoiser.intermediate_size
    assert sizes.denoiser.kv_width == denoiser.n_kv_heads * denoiser.head_dim
    assert sizes.flow is not None
    ffn, n_out = flow.ffn_multiple * flow.dim, 4 * flow.out_channels
    assert sizes.flow == FlowSizes(flow.dim, flow.n_layers, ffn, flow.in_channels, n_out, 4, flow.time_features)
    assert sizes.vocoder is not None
    assert (sizes.vocoder.rates, sizes.vocoder.kernels) == (vocoder.rates, vocoder.kernels)
    assert (sizes.vocoder.initial, sizes.vocoder.block_kernels) == (vocoder.initial_channels, vocoder.resblock_kernels)
    assert sizes.mel_decoder is not None
    assert sizes.mel_decoder.widths == tuple(demo.mel_vae.channels * m for m in demo.mel_vae.multiples)
    assert sizes.mel_decoder.n_res_blocks == demo.mel_vae.n_res_blocks
    assert sizes.encoder is not None
    assert (sizes.encoder.conv_dim, sizes.encoder.dim) == (demo.muq.conv_dim, demo.muq.dim)
    assert (sizes.encoder.n_layers, sizes.encoder.ffn) == (demo.muq.n_layers, demo.muq.ffn_dim)


def test_unknown_graphs_have_no_sizes(tmp_path: Path) -> None:
    sizes = bundle_sizes(Bundle.open(write_stub_bundle(tmp_path / "stub.bundle")))
    assert all(getattr(sizes, name) is None for name in ("encoder", "denoiser", "flow", "mel_decoder", "vocoder"))
    (tmp_path / "broken").write_bytes(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="64 bits"):
        read_shapes(tmp_path / "broken")


# the command, once for real


def test_command_on_the_demo_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report_file, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    args = ["bench", "--steps", "2", "--seconds", "1", "--repeat", "1", "--flow-steps", "1"]
    assert cli.run([*args, "--json", str(report_file), "--plot", str(plot)]) == 0
    out, _ = capfd.readouterr()
    assert "RTF" in out
    assert plot.stat().st_size > 10_000
    report = read_report(report_file)
    (row,) = report["rows"]
    assert row["rtf"] > 0
    assert 0 < row["floor"]["fraction"] < 1
    assert row["checked"]["mel_decoder"] < 1e-3


@pytest.mark.parametrize(
    "args",
    [
        ["--steps", "x"],
        ["--steps", "2.5"],
        ["--steps", "nan"],
        ["--steps", "inf"],
        ["--repeat", "0"],
        ["--peaks", "1"],
        ["--plot", "/nonexistent/a.png"],
        ["--json", "/nonexistent/a.json"],
    ],
)
def test_usage_errors(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *args]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
