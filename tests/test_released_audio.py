"""The released resampler against its golden, and its properties at other rates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lada_rt.errors import ParamError
from lada_rt_export.released_audio import resample_frac
from safetensors.numpy import load_file

GOLDEN_PATTERN = "clamp3_resample*.json"
HERE = Path(__file__).resolve().parent


def test_matches_the_released_resampler(golden_case: Path) -> None:
    tensors = load_file(golden_case.with_suffix(".safetensors"))
    cases = json.loads(golden_case.read_text())["cases"]
    assert cases
    for case in cases:
        x, expected = tensors[f"{case['name']}.in"], tensors[f"{case['name']}.out"]
        assert x.shape == (case["channels"], case["samples"])
        mono = resample_frac(x, case["rate"], 48000).mean(axis=0, keepdims=True)
        assert mono.shape == expected.shape == (1, case["out_samples"])
        np.testing.assert_allclose(mono, expected, rtol=0, atol=1e-5, err_msg=case["name"])


def test_the_committed_goldens_have_the_resampler() -> None:
    assert list((HERE / "golden").glob(GOLDEN_PATTERN))


def direct(x: np.ndarray, a: int, b: int) -> np.ndarray:
    """The definition in float64, one output sample at a time (spec/clamp3.md 3.1)."""
    r = 0.945 * min(a, b)
    width = int(np.ceil(24 * a / r))
    padded = np.pad(x, (width, width + a), mode="edge")
    taps = np.arange(-width, width + a)
    out = []
    for n in range(len(x) * b // a):
        block, phase = divmod(n, b)
        t = np.clip((taps / a - phase / b) * r, -24, 24) * np.pi
        kernel = np.sinc(t / np.pi) * np.cos(t / 48) ** 2
        out.append(padded[block * a : block * a + len(taps)] @ kernel / kernel.sum())
    return np.array(out)


@pytest.mark.parametrize(
    ("rate_in", "rate_out", "n"),
    [
        (3, 2, 50),
        (2, 3, 50),
        (1, 4, 9),
        (7, 1, 30),
        (7, 1, 3),
        (601, 600, 700),
        (600, 601, 700),
        (1, 1, 5),
        (3, 2, 1),
    ],
)
def test_equals_the_definition(rate_in: int, rate_out: int, n: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, n).astype(np.float32)
    out = resample_frac(x, rate_in, rate_out)
    assert out.dtype == np.float32
    expected = x if rate_in == rate_out else direct(x.astype(np.float64), rate_in, rate_out)
    # The release builds its filters in float32: a phase is off by r * pi roundings of a number near 1.
    phase_error = 2**-24 * 0.945 * min(rate_in, rate_out) * np.pi
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 + phase_error)


def test_coprime_rates_need_no_table_of_their_product() -> None:
    time_in = np.arange(44101) / 44101  # the released table would take 8 GB
    out = resample_frac(np.sin(2 * np.pi * 440 * time_in), 44101, 48000)
    expected = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    np.testing.assert_allclose(out[500:-500], expected[500:-500], rtol=0, atol=1e-3)


def test_leading_axes_are_kept_and_the_input_is_not_shared() -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (2, 3, 40)).astype(np.float32)
    out = resample_frac(x, 2, 1)
    assert out.shape == (2, 3, 20)
    np.testing.assert_array_equal(out[1, 2], resample_frac(x[1, 2], 2, 1))
    same = resample_frac(x, 48000, 48000)
    same[:] = 0
    assert x.any()
    assert resample_frac(x[..., :0], 2, 1).shape == (2, 3, 0)


@pytest.mark.parametrize("rate", [0, -1, 44100.0, True, "48000"])
def test_bad_rates_are_refused(rate: object) -> None:
    with pytest.raises(ParamError, match="sample rate"):
        resample_frac(np.zeros(4), rate, 48000)  # type: ignore[arg-type]  # the point of the test


def test_a_number_is_not_a_signal() -> None:
    with pytest.raises(ParamError, match="pass an array"):
        resample_frac(np.float32(1.0), 1, 2)  # type: ignore[arg-type]  # the point of the test
