"""Measures of quality that need weights: right where the answer is known, loud where a file has another form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import pytest
import soundfile
from lada_rt import cli
from lada_rt.bench.learned import ClampScore, FrechetDistance, LearnedMetrics
from lada_rt.bundle import demo_bundle_path
from lada_rt.errors import BundleError, ParamError
from onnx import TensorProto, helper

RATE = 8_000
FRAME = 80


def save_model(path: Path, *, inputs: int = 1, flat: bool = False) -> Path:
    """Embeddings of frames of FRAME samples: the mean of each half."""
    nodes = [
        helper.make_node("Reshape", ["audio", "shape"], ["frames"]),
        helper.make_node("ReduceMean", ["frames", "axis"], ["embedding"], keepdims=int(flat)),
    ]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "N"]) for n in ("audio", "more")[:inputs]]
    made = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)
    constants = [
        helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 2, FRAME // 2]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
    ]
    graph = helper.make_graph(nodes, "embed", given, [made], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def steps(levels: np.ndarray) -> np.ndarray:
    """[2, N] audio whose embeddings are exactly `levels` [n, 2]."""
    return np.repeat(np.repeat(levels.reshape(-1), FRAME // 2)[None], 2, axis=0).astype(np.float32)


def save_statistics(path: Path, levels: np.ndarray) -> Path:
    np.savez(path, mean=levels.mean(axis=0), covariance=np.cov(levels, rowvar=False))
    return path


def levels_of(mean: tuple[float, float], deviation: tuple[float, float], n: int = 400) -> np.ndarray:
    """[n, 2] with these moments, to rounding, and no correlation."""
    rng = np.random.default_rng(7)
    drawn = rng.standard_normal((n, 2))
    drawn -= drawn.mean(axis=0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T
    return np.asarray(white * deviation + mean)


def test_fad_of_known_gaussians(tmp_path: Path) -> None:
    """Independent axes: the sum of (m_a - m_b)^2 + (s_a - s_b)^2 over them."""
    reference = save_statistics(tmp_path / "r.npz", levels_of((0.1, -0.1), (0.05, 0.02)))
    fad = FrechetDistance(save_model(tmp_path / "m.onnx"), RATE, reference)
    assert fad(steps(levels_of((0.1, -0.1), (0.05, 0.02))), RATE) == pytest.approx(0, abs=1e-8)
    found = fad(steps(levels_of((0.3, 0.0), (0.02, 0.08))), RATE)
    assert found == pytest.approx(0.2**2 + 0.1**2 + 0.03**2 + 0.06**2, rel=1e-4)


def test_fad_of_correlated_gaussians_is_symmetric_and_as_by_a_matrix_root(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    a, b = levels_of((0, 0), (0.1, 0.01)), levels_of((0, 0), (0.1, 0.01)) @ turn.T
    there = FrechetDistance(model, RATE, save_statistics(tmp_path / "b.npz", b))(steps(a), RATE)
    back = FrechetDistance(model, RATE, save_statistics(tmp_path / "a.npz", a))(steps(b), RATE)
    assert there == pytest.approx(back, rel=1e-3)
    values = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    expected = 2 * (0.1**2 + 0.01**2) - 2 * np.sqrt(values).sum()
    assert there == pytest.approx(float(expected.real), rel=1e-3)


def test_the_reference_may_be_a_folder_of_audio(tmp_path: Path) -> None:
    songs = tmp_path / "songs"
    songs.mkdir()
    levels = levels_of((0.1, 0.2), (0.05, 0.03))
    for index, part in enumerate(np.split(levels, 4)):
        soundfile.write(songs / f"{index}.wav", steps(part).T, RATE, subtype="FLOAT")
    (songs / "notes.txt").write_text("not audio")
    fad = FrechetDistance(save_model(tmp_path / "m.onnx"), RATE, songs)
    assert fad(steps(levels), RATE) == pytest.approx(0, abs=1e-8)
    assert fad(steps(levels + 0.5), RATE) == pytest.approx(0.5, rel=1e-3)


def test_audio_of_another_rate_is_resampled(tmp_path: Path) -> None:
    reference = save_statistics(tmp_path / "r.npz", levels_of((0.2, 0.2), (0.0, 0.0)))
    fad = FrechetDistance(save_model(tmp_path / "m.onnx"), RATE, reference)
    assert fad(np.full((2, 48_000), 0.2, np.float32), 48_000) < 1e-3


@pytest.mark.parametrize(
    ("model", "reference", "message"),
    [
        ({"inputs": 2}, "good.npz", "expected one input"),
        ({"flat": True}, "good.npz", r"expected finite embeddings \[n, D\]"),
        ({}, "missing", "expected a folder of audio files or an .npz"),
        ({}, "empty", "expected a folder of audio files or an .npz"),
        ({}, "text.npz", "expected `mean` and `covariance`"),
        ({}, "wide.npz", "expected statistics of 2 numbers"),
        ({}, "square.npz", r"expected mean \[D\] and covariance"),
        ({}, "nan mean.npz", "expected finite numbers"),
        ({}, "infinite covariance.npz", "expected finite numbers"),
    ],
)
def test_files_of_another_form_are_refused(model: dict[str, Any], reference: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    save_statistics(tmp_path / "good.npz", levels_of((0, 0), (1, 1)))
    save_statistics(tmp_path / "wide.npz", np.random.default_rng(0).standard_normal((9, 3)))
    np.savez(tmp_path / "square.npz", mean=np.zeros(2), covariance=np.zeros((3, 3)))
    np.savez(tmp_path / "nan mean.npz", mean=np.array([np.nan, 0]), covariance=np.eye(2))
    np.savez(tmp_path / "infinite covariance.npz", mean=np.zeros(2), covariance=np.full((2, 2), np.inf))
    path = save_model(tmp_path / "m.onnx", **model)
    with pytest.raises(ParamError, match=message):
        FrechetDistance(path, RATE, tmp_path / reference)  # before anything is measured


def test_too_little_audio_for_a_covariance_is_refused(tmp_path: Path) -> None:
    reference = save_statistics(tmp_path / "r.npz", levels_of((0, 0), (1, 1)))
    fad = FrechetDistance(save_model(tmp_path / "m.onnx"), RATE, reference)
    with pytest.raises(ParamError, match="two embeddings at least from the generated audio, got 1"):
        fad(steps(np.array([[0.1, 0.2]])), RATE)


def test_a_model_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no graph")
    with pytest.raises(BundleError, match="cannot load it"):
        FrechetDistance(tmp_path / "m.onnx", RATE, save_statistics(tmp_path / "r.npz", levels_of((0, 0), (1, 1))))
    with pytest.raises(ParamError, match="no such file"):
        FrechetDistance(tmp_path / "n.onnx", RATE, tmp_path / "r.npz")


def test_clamp_score_tells_texts_and_sounds_apart() -> None:
    rng = np.random.default_rng(1)
    noise = (0.1 * rng.standard_normal((2, 48_000))).astype(np.float32)
    tone = np.repeat(0.3 * np.sin(np.arange(48_000) * 0.05)[None], 2, axis=0).astype(np.float32)
    scores = {
        (text, name): ClampScore(demo_bundle_path(), text)(audio, 48_000)
        for text in ("warm city pop", "angry metal")
        for name, audio in (("noise", noise), ("tone", tone))
    }
    assert len({round(score, 6) for score in scores.values()}) == 4
    assert all(-1 <= score <= 1 for score in scores.values())
    again = ClampScore(demo_bundle_path(), "angry metal")(0.5 * (tone[:1] + tone[1:]), 48_000)
    assert again == pytest.approx(scores["angry metal", "tone"], abs=1e-5)


def test_clamp_score_needs_a_text() -> None:
    with pytest.raises(ParamError, match="add --text"):
        LearnedMetrics(clamp_bundle=demo_bundle_path()).open(" ")


@pytest.mark.parametrize(
    "given", [{"fad_model": Path("m")}, {"fad_rate_hz": 16_000}, {"fad_model": Path("m"), "fad_reference": Path("r")}]
)
def test_half_of_fad_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ParamError, match="together, or none"):
        LearnedMetrics(**given)


def test_the_command_reports_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reference = save_statistics(tmp_path / "r.npz", levels_of((0, 0), (0.1, 0.1)))
    model = save_model(tmp_path / "m.onnx")
    out = tmp_path / "report.json"
    args = ["bench", "--steps", "2", "--seconds", "1", "--repeat", "1", "--flow-steps", "1", "--text", "soul"]
    learned = ["--fad-model", str(model), "--fad-rate", str(RATE), "--fad-reference", str(reference)]
    clamp = ["--clamp-bundle", str(demo_bundle_path())]
    assert cli.run([*args, *learned, *clamp, "--json", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "FAD" in printed
    assert "CLaMP score" in printed
    report = json.loads(out.read_text())
    quality = report["rows"][0]["quality"]
    assert quality["fad"] > 0
    assert -1 <= quality["clamp_score"] <= 1
    assert report["options"]["learned"]["fad_model"] == "m.onnx"
    assert str(tmp_path) not in out.read_text()


def test_errors_come_before_any_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--fad-model", str(tmp_path / "m.onnx")]) == 2
    assert "together" in capfd.readouterr().err
    assert cli.run(["bench", "--clamp-bundle", str(demo_bundle_path()), "--text", "soul", "--no-quality"]) == 2
    assert "--no-quality" in capfd.readouterr().err
