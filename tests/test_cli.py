"""The command line with the embedded demo bundle: output, determinism, exit codes, error lines, no partial files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lada_rt import GenerationParams, Pipeline, cli
from lada_rt.audio import AudioWriter
from lada_rt.bundle import demo_bundle_path
from lada_rt.geometry import CodecGeometry
from lada_rt.loudness import integrated_lufs
from lada_rt.mix import true_peak
from lada_rt.wav import wav_header
from stubs import GEOMETRY, stub_pipeline, sung

FAST = ["--steps", "2", "--flow-steps", "1", "--guidance", "1"]


@pytest.fixture
def vocal(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "vocal.wav", sung(44_100), 44_100)
    return tmp_path / "vocal.wav"


def run(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run a command in this process: (exit code, stdout, stderr)."""
    capfd.readouterr()
    code = cli.run([str(a) for a in args])
    out, err = capfd.readouterr()
    return code, out, err


def test_generate_writes_audio_and_report(tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, report_file = tmp_path / "out.wav", tmp_path / "report.json"
    code, printed, messages = run(capfd, "generate", vocal, "-o", out, "--json", report_file, *FAST)
    assert code == 0
    samples, rate_hz = soundfile.read(out)
    geometry = CodecGeometry()
    assert rate_hz == 48_000
    assert samples.shape == (geometry.n_samples(geometry.n_codes(48_000)), 2)
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() > 0
    assert "RTF" in printed
    assert "TTFA" in printed
    assert printed.strip().endswith(str(out))
    assert "bundle lada-rt-demo" in printed
    assert "no --bundle: using the embedded lada-rt-demo" in messages
    report = json.loads(report_file.read_text())
    assert report["duration_s"] == len(samples) / 48_000
    assert report["peak"] == pytest.approx(np.abs(samples).max(), abs=1e-4)
    assert -120 < report["true_peak_dbtp"] < 1
    assert report["mix_gain"] is None
    assert set(report["loudness_lufs"]) == {"vocal", "accompaniment", "output"}
    assert -40 < report["loudness_lufs"]["vocal"] < 0
    assert len(report["codes"]) == int(48_000 / 48_000 * 25) + 1
    assert report["seed"] == 13
    assert report["params"]["steps"] == 2
    assert report["bundle"]["trained"] is True
    assert len(report["bundle"]["sha256"]) == 64
    assert {"encode_s", "condition_s", "denoise_s", "decode_s", "total_s", "first_audio_s", "rtf"} <= set(
        report["timings"]
    )
    # what the first audio is promised within: encoding, denoising and one window, and a tenth
    timings = report["timings"]
    assert report["ttfa_limit_s"] == pytest.approx(
        1.1 * (timings["encode_s"] + timings["denoise_s"] + timings["first_window_s"]), abs=1e-5
    )
    assert report["ttfa_s"] == pytest.approx(timings["first_audio_s"], abs=1e-5)


def test_same_command_same_bytes_other_seed_other_bytes(
    tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for name, seed in (("a", 13), ("b", 13), ("c", 14)):
        out = tmp_path / f"{name}.wav"
        assert run(capfd, "generate", vocal, "-o", out, "--seed", seed, *FAST)[0] == 0
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_stdout_is_a_wav(vocal: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(vocal), "-o", "-", *FAST]
    done = subprocess.run(command, capture_output=True, check=True)
    path = tmp_path / "piped.wav"
    path.write_bytes(done.stdout)
    assert soundfile.info(path).frames == 26 * 1920
    assert b"RTF" in done.stderr


@pytest.mark.parametrize("options", [[], ["--mix"]])
def test_header_comes_first_and_a_closed_pipe_ends_the_run(vocal: Path, options: list[str]) -> None:
    """The header, with the true length, is there while the denoiser works; without a reader the work stops."""
    command = [sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(vocal), "-o", "-", "--steps", "9999"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    header = process.stdout.read(44)
    assert header == wav_header(48_000 if options else 26 * 1920, 48_000)
    process.stdout.close()
    started = time.monotonic()
    messages = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert time.monotonic() - started < 20
    assert b"no --bundle" in messages
    assert messages.count(b"\n") == 1


@pytest.fixture
def stubbed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """Commands run on trivial engines, for what does not depend on the networks."""
    pipe = stub_pipeline(tmp_path_factory.mktemp("stub"))
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *args, **options: pipe))
    return pipe


def song(path: Path, seconds: float, level: float = 1.0) -> Path:
    soundfile.write(
        path, np.stack([sung(int(48_000 * seconds)), sung(int(48_000 * seconds), 1)], axis=1) * level, 48_000
    )
    return path


@pytest.mark.parametrize("options", [[], ["--mix"]], ids=["alone", "mix"])
@pytest.mark.parametrize("level", [0.3, 2.0])
def test_stdout_equals_the_file(
    tmp_path: Path,
    stubbed: Pipeline,
    capfdbinary: pytest.CaptureFixture[bytes],
    options: list[str],
    level: float,
) -> None:
    path, out = song(tmp_path / "song.wav", 70, level), tmp_path / "out.wav"
    assert cli.run(["generate", str(path), "-o", str(out), *options, *FAST]) == 0
    capfdbinary.readouterr()
    assert cli.run(["generate", str(path), "-o", "-", *options, *FAST]) == 0
    printed, messages = capfdbinary.readouterr()
    assert printed == out.read_bytes()
    n_codes = GEOMETRY.n_codes(48_000 * 70)
    assert soundfile.info(out).frames == (48_000 * 70 if options else GEOMETRY.n_samples(n_codes))
    assert (b"turned down" in messages) == (options == ["--mix"] and level > 1)


def test_chunks_reach_the_pipe_before_the_end(
    tmp_path: Path, stubbed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window's audio is written before the next but one is begun."""
    n_flows, written, writes = 0, 0, []
    flow, write = stubbed._engines["flow"], AudioWriter.write

    class Watch:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            nonlocal n_flows
            n_flows += 1
            return flow.run(**inputs)

    def watched(self: AudioWriter, samples: np.ndarray) -> None:
        nonlocal written
        write(self, samples)
        writes.append((written // GEOMETRY.hop_samples, n_flows))
        written += samples.shape[1]

    stubbed._engines["flow"] = Watch()
    monkeypatch.setattr(AudioWriter, "write", watched)
    path = song(tmp_path / "song.wav", 150)
    assert cli.run(["generate", str(path), "-o", str(tmp_path / "o.wav"), *FAST]) == 0
    assert [window for window, _ in writes] == sorted([*range(5)] * 6)  # six blocks of the vocoder each
    for window, n_begun in writes:
        # one window finished in the queue, one more in the making
        assert n_begun <= window + 3


def test_mix_report(tmp_path: Path, stubbed: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    path, out, report_file = song(tmp_path / "song.wav", 20, 2.0), tmp_path / "mix.flac", tmp_path / "r.json"
    code, _, messages = run(capfd, "generate", path, "-o", out, "--mix", "--json", report_file, *FAST)
    assert code == 0
    assert soundfile.info(out).frames == 48_000 * 20
    report = json.loads(report_file.read_text())
    gain = report["mix_gain"]
    assert gain["vocal_db"] == gain["accompaniment_db"] == 0
    assert gain["lowest_gain_db"] < 0
    assert gain["limited_s"] > 0
    assert f"{-gain['lowest_gain_db']:.1f} dB" in messages
    assert report["true_peak_dbtp"] < gain["ceiling_dbtp"] + 0.1
    written = soundfile.read(out, dtype="float32")[0].T
    assert 20 * np.log10(true_peak(written)) == pytest.approx(report["true_peak_dbtp"], abs=0.01)
    lufs = report["loudness_lufs"]
    assert lufs["output"] == pytest.approx(integrated_lufs(written, 48_000), abs=0.01)
    assert lufs["vocal"] != lufs["accompaniment"]


def test_report_without_pyloudnorm_says_so(
    tmp_path: Path, stubbed: Pipeline, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lada_rt.loudness.available", lambda: False)
    path, report_file = song(tmp_path / "song.wav", 1), tmp_path / "r.json"
    assert run(capfd, "generate", path, "-o", tmp_path / "o.wav", "--json", report_file, *FAST)[0] == 0
    report = json.loads(report_file.read_text())
    assert report["loudness_lufs"] is None
    assert "pip install" in report["loudness_note"]


def test_keep_and_redo(tmp_path: Path, stubbed: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    path, codes = song(tmp_path / "song.wav", 50), tmp_path / "codes.npz"

    def audio(name: str, *options: object) -> np.ndarray:
        out = tmp_path / f"{name}.wav"
        code, _, messages = run(capfd, "generate", path, "-o", out, *options)
        assert code == 0, messages
        return soundfile.read(out, dtype="int16")[0]

    first = audio("first", "--save-codes", codes, "--text", "soul", "--start", 2, *FAST)
    np.testing.assert_array_equal(audio("again", "--keep", codes), first)
    redone = audio("redone", "--keep", codes, "--redo", "20:25.5", "--save-codes", tmp_path / "next.npz")
    assert redone.shape == first.shape
    np.testing.assert_array_equal(redone[: 48_000 * 19], first[: 48_000 * 19])
    np.testing.assert_array_equal(redone[int(48_000 * 26.1) :], first[int(48_000 * 26.1) :])
    assert (redone[48_000 * 20 : 48_000 * 25] != first[48_000 * 20 : 48_000 * 25]).any()
    np.testing.assert_array_equal(audio("twice", "--keep", tmp_path / "next.npz"), redone)
    seeded = [audio(f"seed{s}", "--keep", codes, "--redo", "20:25.5", "--seed", s) for s in (14, 15)]
    np.testing.assert_array_equal(seeded[0], redone)  # 13 + 1, which is what no seed means
    assert (seeded[1] != redone).any()
    mixed = audio("mixed", "--keep", codes, "--mix")
    assert len(mixed) == 48_000 * 48


@pytest.mark.parametrize(
    "options",
    [
        ["--redo", "1:2"],
        ["--keep", "CODES", "--redo", "1"],
        ["--keep", "CODES", "--redo", "2:1"],
        ["--keep", "CODES", "--redo", "a:b"],
        ["--keep", "CODES", "--redo", "90:95"],
        ["--keep", "CODES", "--text", "soul"],
        ["--keep", "CODES", "--redo", "0:1", "--start", "1"],
        ["--keep", "CODES", "--steps", "3"],
        ["--keep", "none.npz"],
        ["--keep", "OTHER"],
        ["--keep", "VOCAL"],
        ["--save-codes", "/no/such/folder/codes.npz"],
    ],
    ids=" ".join,
)
def test_bad_keep(tmp_path: Path, stubbed: Pipeline, capfd: pytest.CaptureFixture[str], options: list[str]) -> None:
    path, other, out = song(tmp_path / "song.wav", 3), song(tmp_path / "other.wav", 4), tmp_path / "out.wav"
    files = {"CODES": tmp_path / "codes.npz", "OTHER": tmp_path / "other.npz", "VOCAL": path}
    for name, source in (("CODES", path), ("OTHER", other)):
        assert run(capfd, "generate", source, "-o", tmp_path / "x.wav", "--save-codes", files[name], *FAST)[0] == 0
    refused(run(capfd, "generate", path, "-o", out, *(files.get(o, o) for o in options)), 2, out)


def test_long(tmp_path: Path, stubbed: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "long.wav", tmp_path / "out.wav"
    soundfile.write(path, sung(8_000 * 400), 8_000)
    refused(run(capfd, "generate", path, "-o", out, *FAST), 3, out)
    assert run(capfd, "generate", path, "-o", out, "--long", *FAST)[0] == 0
    assert soundfile.info(out).frames == GEOMETRY.n_samples(GEOMETRY.n_codes(48_000 * 400))


BAD_OPTIONS = [
    ["--steps", "0"],
    ["--steps", "x"],
    ["--top-k", "0"],
    ["--top-p", "0"],
    ["--top-p", "2"],
    ["--temperature", "0"],
    ["--schedule", "unknown"],
    ["--schedule", "cosine:2"],
    ["--strategy", "none"],
    ["--flow-steps", "0"],
    ["--seed", "-1"],
    ["--end", "-1"],
    ["--start", "0.5", "--end", "0.2"],
    ["--start", "nan"],
    ["--no-such-option"],
    ["--backend", "magic"],
    ["--device", "abacus"],
    ["--json", "/no/such/folder/r.json"],
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=" ".join)
def test_bad_options(options: list[str], tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.wav"
    refused(run(capfd, "generate", vocal, "-o", out, *options), 2, out)


def test_bad_outputs(tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "none" / "out.wav", tmp_path / "out.xyz", vocal, tmp_path):
        before = out.read_bytes() if out.is_file() else None
        code, printed, messages = run(capfd, "generate", vocal, "-o", out, *FAST)
        assert (code, printed) == (2, "")
        assert messages.count("\n") == 1
        assert (out.read_bytes() if out.is_file() else None) == before
    code, _, messages = run(capfd, "generate", vocal)
    assert code == 2
    assert messages.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refused(run(capfd, "generate", vocal, "-o", closed / "out.wav", *FAST), 2, closed / "out.wav")


def test_full_disk(
    tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk would."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out.wav"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        result = run(capfd, "generate", vocal, "-o", out, *FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    refused(result, 2, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocal.wav"]


def test_bad_vocals(tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.wav"
    text = tmp_path / "text.wav"
    text.write_text("not audio " * 100)
    soundfile.write(tmp_path / "zero.wav", np.zeros((0, 1)), 44_100)
    soundfile.write(tmp_path / "short.wav", sung(2205), 44_100)
    soundfile.write(tmp_path / "long.wav", np.zeros(8_000 * 361), 8_000)
    for name in ("missing.wav", "text.wav", "zero.wav", "short.wav", "long.wav"):
        refused(run(capfd, "generate", tmp_path / name, "-o", out, *FAST), 3, out)
    refused(run(capfd, "generate", vocal, "-o", out, "--start", "5", *FAST), 3, out)
    refused(run(capfd, "generate", vocal, "-o", out, "--reference", tmp_path / "missing.wav", *FAST), 3, out)


def test_nan_and_silence_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = sung(22_050)
    broken[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 44_100, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", np.zeros(22_050), 44_100)
    for name, warned in (("nan.wav", True), ("silence.wav", False)):
        out = tmp_path / f"out-{name}"
        code, _, messages = run(capfd, "generate", tmp_path / name, "-o", out, *FAST)
        assert code == 0
        assert ("NaN" in messages) == warned
        assert np.isfinite(soundfile.read(out)[0]).all()


def test_bad_bundles(tmp_path: Path, vocal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.wav"
    refused(run(capfd, "generate", vocal, "-o", out, "--bundle", tmp_path / "none"), 4, out)
    for damage in ("altered", "truncated", "newer", "missing"):
        bundle = tmp_path / damage
        shutil.copytree(demo_bundle_path(), bundle)
        graph = bundle / "graphs" / "flow.onnx"
        data = bytearray(graph.read_bytes())
        if damage == "altered":
            data[len(data) // 2] ^= 1
            graph.write_bytes(data)
        elif damage == "truncated":
            graph.write_bytes(data[: len(data) // 2])
        elif damage == "missing":
            graph.unlink()
        else:
            manifest = json.loads((bundle / "manifest.json").read_text())
            (bundle / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
        refused(run(capfd, "generate", vocal, "-o", out, "--bundle", bundle), 4, out)
        refused(run(capfd, "inspect", bundle), 4, out)


def refused(result: tuple[int, str, str], code: int, out: Path) -> None:
    found, printed, messages = result
    lines = [line for line in messages.splitlines() if "no --bundle" not in line]
    assert found == code, messages
    assert printed == ""
    assert len(lines) == 1, messages
    assert "Traceback" not in messages
    assert not out.exists()


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, "lada-rt: interrupted"), (signal.SIGTERM, 143, "")]
)
def test_a_stopped_run_leaves_nothing(tmp_path: Path, vocal: Path, number: int, code: int, says: str) -> None:
    out = tmp_path / "out.wav"
    command = [sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(vocal), "-o", str(out), "--flow-steps", "999"]
    # a shell starts background jobs with SIGINT ignored, which children inherit; a handler they do not
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert b"no --bundle" in process.stderr.readline()  # loaded; the run has begun
    time.sleep(2)
    process.send_signal(number)
    started = time.monotonic()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code
    assert messages.decode().strip() == says
    assert time.monotonic() - started < 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocal.wav"]


def test_inspect_and_doctor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capfd, "inspect", "--json", tmp_path / "i.json")
    assert code == 0
    for word in ("encoder", "denoiser", "flow", "mel_decoder", "vocoder", "trained", "verified"):
        assert word in printed
    assert json.loads((tmp_path / "i.json").read_text())["verified"] is True
    code, printed, _ = run(capfd, "doctor", "--json", tmp_path / "d.json")
    assert code == 0
    assert "ready to generate" in printed
    assert json.loads((tmp_path / "d.json").read_text())["ready"] is True


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], ["generate", "--help"], ["--version"]):
        code, printed, messages = run(capfd, *args)
        assert code == 0
        assert printed
        assert not messages
    assert run(capfd, "no-such-command")[0] == 2


def test_defaults_are_those_of_the_library() -> None:
    options = {option.name: option for option in cli.generate.params}
    for field in dataclasses.fields(GenerationParams):
        assert options[field.name].default == field.default
        assert isinstance(field.default, type(options[field.name].type.convert(str(field.default), None, None)))


def test_import_is_light() -> None:
    """`import lada_rt` loads neither a backend nor torch, and neither does reading the help."""
    code = "import lada_rt.cli, sys; print([m for m in ('torch', 'onnxruntime', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generates_without_torch(tmp_path: Path, vocal: Path) -> None:
    """The runtime has no use for torch: with the import blocked, a generation runs."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lada_rt import cli\n"
        f"sys.exit(cli.run({['generate', str(vocal), '-o', str(tmp_path / 'o.wav'), *FAST]!r}))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
    assert (tmp_path / "o.wav").exists()
