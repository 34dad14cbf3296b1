"""Vocal preparation, encoder windows and the token count, against the released program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_io import read_sidecar, read_tensors, vq_of, weights_of
from golden_weights import select_weights
from lada_rt.encode import encode, encode_window, prepare_vocal
from lada_rt.errors import AudioError
from lada_rt.geometry import CodecGeometry
from lada_rt_export.models.muq import MuQ, MuQConfig, dead_keys
from lada_rt_export.models.stages_mucodec import EncoderStage
from lada_rt_export.torch_engine import TorchEngine


def test_prepare_vocal_matches_golden(golden_case: Path) -> None:
    tensors = read_tensors(golden_case)
    names = [n.removesuffix("_in") for n in tensors if n.startswith("prep") and n.endswith("_in")]
    assert names
    for name in names:
        for given, expected in zip(tensors[f"{name}_in"].numpy(), tensors[f"{name}_out"].numpy(), strict=True):
            np.testing.assert_allclose(prepare_vocal(given), expected, rtol=1e-5, atol=1e-6)


test_prepare_vocal_matches_golden.golden_pattern = "mucodec_resample*.json"


def test_windows_match_golden(golden_case: Path) -> None:
    sidecar = read_sidecar(golden_case)
    geometry = CodecGeometry()
    assert sidecar["window_samples"] == geometry.encode_window_samples
    for case in sidecar["cases"]:
        assert geometry.n_codes(case["n_samples"]) == case["n_codes"]
        n = case["n_samples"]
        ramp = np.stack([np.arange(n, dtype=np.float64), -np.arange(n, dtype=np.float64)])
        for index, runs in enumerate(case["windows"]):
            expected = np.concatenate([np.arange(first, first + length) for first, length in runs])
            window = encode_window(ramp, index, geometry)
            np.testing.assert_array_equal(window[0], expected.astype(np.float32))
            np.testing.assert_array_equal(window[1], -expected.astype(np.float32))


test_windows_match_golden.golden_pattern = "mucodec_sound2code_windows.json"


def test_sound2code_matches_golden(golden_case: Path) -> None:
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    config, weights = sidecar["config"], weights_of(tensors)
    muq_config = MuQConfig(
        conv_dim=config["conv_dim"],
        dim=config["encoder_dim"],
        n_layers=config["layer_index"],
        n_heads=config["num_attention_heads"],
        ffn_dim=config["intermediate_size"],
    )
    muq = MuQ(muq_config)
    state = select_weights(weights, prefix="muencoder.model.", drop=dead_keys(muq_config))
    muq.load_state_dict(state)
    stage = EncoderStage(muq.eval(), vq_of(config["rvq"], weights), weights.get("rsq48tomuencoder.kernel"))
    codes = encode(TorchEngine(stage, ["codes"]), tensors["audio"].numpy(), CodecGeometry())
    expected = tensors["codes"].flatten().numpy()
    assert codes.shape == expected.shape
    clear = tensors["cos_gap"].flatten().numpy()[: len(codes)] > 1e-3
    np.testing.assert_array_equal(codes[clear], expected[clear])
    assert (codes == expected).mean() > 0.99


test_sound2code_matches_golden.golden_pattern = "mucodec_sound2code.json"


class CountingEncoder:
    """Codes that name the window they come from."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, *, audio: np.ndarray) -> dict[str, np.ndarray]:
        assert audio.shape == (1, 2, 1_966_560)
        assert audio.flags.c_contiguous
        self.calls += 1
        return {"codes": np.full((1, 1024), self.calls, np.int64)}


@pytest.mark.parametrize(
    ("n_samples", "n_codes", "n_windows"),
    [
        (1, 1, 1),
        (1919, 1, 1),
        (1920, 2, 1),
        (48_000, 26, 1),
        (1_440_000, 751, 1),
        (1_966_080, 1025, 2),
        (4_800_000, 2501, 3),
    ],
)
def test_only_needed_windows_are_encoded(n_samples: int, n_codes: int, n_windows: int) -> None:
    engine = CountingEncoder()
    codes = encode(engine, np.zeros((1, n_samples), np.float32), CodecGeometry())
    assert (len(codes), engine.calls) == (n_codes, n_windows)
    assert codes.dtype == np.int64


@pytest.mark.parametrize("shape", [(3, 100), (2, 0), (100,)])
def test_prepare_vocal_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(AudioError):
        prepare_vocal(np.zeros(shape, np.float32))


def test_token_count_follows_float_rounding() -> None:
    """N = 1920 k gives k instead of k + 1 for some k (spec/mucodec 2.9)."""
    geometry = CodecGeometry()
    short = [k for k in range(1, 202) if geometry.n_codes(1920 * k) == k]
    assert short == [29, 57, 58, 113, 114, 115, 116, 201]
